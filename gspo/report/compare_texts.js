// Where two responses part, and in what they differ from there on. The run keeps texts, not tokens: the pieces that are
// compared are words, numbers and single characters, about as fine as a tokenizer's.

const MOST_CELLS = 4e6; // of the table below, which takes a byte each

/** Split a text into pieces whose concatenation is the text. */
function pieces(text) {
  return text.match(/\s|\d+|[\p{Script=Latin}_]+|[^]/gu) || [];
}

/** Return how many first pieces two lists share. */
function forkOf(a, b) {
  let place = 0;
  while (place < a.length && place < b.length && a[place] === b[place]) place += 1;
  return place;
}

/** Return for the pieces of each list whether they differ: not in a longest common subsequence behind the fork. */
function differing(a, b) {
  const start = forkOf(a, b);
  const [rows, columns] = [a.length - start, b.length - start];
  const marked = [a.map((_, i) => i >= start), b.map((_, i) => i >= start)];
  if (rows * columns > MOST_CELLS) return marked;
  // common[j]: the longest for a's pieces from i and b's from j; way: where it goes on
  let common = new Uint32Array(columns + 1);
  const way = new Uint8Array(rows * columns); // 0: both, 1: a's next, 2: b's next
  for (let i = rows - 1; i >= 0; i -= 1) {
    const next = new Uint32Array(columns + 1);
    for (let j = columns - 1; j >= 0; j -= 1) {
      const same = a[start + i] === b[start + j];
      way[i * columns + j] = same ? 0 : common[j] >= next[j + 1] ? 1 : 2;
      next[j] = same ? common[j + 1] + 1 : Math.max(common[j], next[j + 1]);
    }
    common = next;
  }
  for (let i = 0, j = 0; i < rows && j < columns; ) {
    const step = way[i * columns + j];
    if (step === 0) marked[0][start + i] = marked[1][start + j] = false;
    i += step === 2 ? 0 : 1;
    j += step === 1 ? 0 : 1;
  }
  return marked;
}

/** Return nodes of a text with the fork and the marked pieces shown; neighbours are marked together. */
function markedText(parts, marks, fork, kind) {
  const nodes = [parts.slice(0, fork).join(""), element("span", { class: "fork", title: word("fork") })];
  for (let i = fork; i < parts.length; ) {
    let end = i;
    while (end < parts.length && marks[end] === marks[i]) end += 1;
    const text = parts.slice(i, end).join("");
    nodes.push(marks[i] ? element("mark", { class: kind }, text) : text);
    i = end;
  }
  return nodes;
}
