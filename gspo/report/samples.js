// The browser of samples: groups that pass the filter, some at a time.

const AT_ONCE = 20;
const [STEP, PROMPT, TRUTH, RESPONSES, CHOSEN, REJECTED] = [0, 1, 2, 3, 4, 5];

/** Return whether a reward is that of a right response. */
function isRight(reward, run) {
  return reward >= run.right_at - 1e-5 * Math.abs(run.right_at);
}

/** Return whether a group's responses are all right, mixed or all wrong. */
function outcomeOf(group, run) {
  const right = group[RESPONSES].filter(([, reward]) => isRight(reward, run)).length;
  return right === 0 ? "wrong" : right === group[RESPONSES].length ? "right" : "mixed";
}

/** Return [run, group] of all groups that pass the filter {run, round, outcome, search}; "" lets all pass. */
function passing(runs, filter) {
  const wanted = filter.search.toLowerCase();
  const has = (text) => text.toLowerCase().includes(wanted);
  const found = [];
  runs.forEach((run, number) => {
    if (filter.run !== "" && filter.run !== String(number)) return;
    for (const group of run.samples) {
      const fits =
        (filter.round === "" || roundAt(group[STEP], run.rounds) === Number(filter.round)) &&
        (filter.outcome === "" ||
          (filter.outcome === "pair" ? group[CHOSEN] !== null : outcomeOf(group, run) === filter.outcome)) &&
        (!wanted || has(run.prompts[group[PROMPT]]) || has(group[TRUTH]) || group[RESPONSES].some(([text]) => has(text)));
      if (fits) found.push([run, group]);
    }
  });
  return found;
}

/** Return the article of a group: the prompt, the responses from the best to the worst, and the pair. */
function groupArticle(run, group, many) {
  const round = roundAt(group[STEP], run.rounds);
  const title = word("groupTitle", { step: group[STEP], round });
  const article = element("article", {},
    element("h3", {}, `${many ? `${run.name} · ` : ""}${title}`),
    element("p", { class: "prompt text" }, run.prompts[group[PROMPT]]),
    element("p", { class: "soft text" }, word("truth", { truth: group[TRUTH] })));
  const list = element("ol", { class: "responses" });
  group[RESPONSES].forEach(([text, reward, times], i) => {
    const line = element("li", {}, element("span", { class: isRight(reward, run) ? "reward right" : "reward" }, short(reward)));
    if (times > 1) line.append(" ", element("span", { class: "soft" }, word("times", { times })));
    if (i === group[CHOSEN]) line.append(" ", element("span", { class: "tag won" }, word("chosen")));
    if (i === group[REJECTED]) line.append(" ", element("span", { class: "tag lost" }, word("rejected")));
    line.append(element("div", { class: "text" }, text));
    list.append(line);
  });
  article.append(list);
  if (group[CHOSEN] !== null && group[REJECTED] !== null) article.append(pairOf(group));
  return article;
}

/** Return the chosen and the rejected response side by side, marked where they differ. */
function pairOf(group) {
  const [won, lost] = [CHOSEN, REJECTED].map((side) => pieces(group[RESPONSES][group[side]][0]));
  const [fork, [wonMarks, lostMarks]] = [forkOf(won, lost), differing(won, lost)];
  const side = (name, kind, parts, marks) =>
    element("div", {}, element("span", { class: `tag ${kind}` }, word(name)),
      element("div", { class: "text" }, ...markedText(parts, marks, fork, kind)));
  return element("div", { class: "pair" }, side("chosen", "won", won, wonMarks), side("rejected", "lost", lost, lostMarks));
}

/** Show the groups that pass the filter: the first ones now, more when the button is pressed. */
function showSamples(data, filter) {
  const found = passing(data.runs, filter);
  const all = data.runs.reduce((sum, run) => sum + run.samples.length, 0);
  const [place, more] = [document.getElementById("groups"), document.getElementById("more")];
  document.getElementById("found").textContent = word("found", { found: found.length, all });
  place.replaceChildren(...(all ? [] : [element("p", {}, word("noSamples"))]));
  const add = () => {
    const shown = place.querySelectorAll("article").length;
    const next = found.slice(shown, shown + AT_ONCE);
    place.append(...next.map(([run, group]) => groupArticle(run, group, data.runs.length > 1)));
    more.hidden = shown + next.length >= found.length;
  };
  more.onclick = add;
  add();
}
