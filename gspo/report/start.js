// What the reader has chosen stands in the address behind `#`, so that a link leads to the same view.

const CHOICES = ["language", "run", "round", "outcome", "search"];

/** Return the reader's choices: from the address, the language else the page's or the browser's. */
function choicesOf(address, pagesLanguage, browsersLanguage) {
  const given = new URLSearchParams(address.replace(/^#/, ""));
  const choices = Object.fromEntries(CHOICES.map((name) => [name, given.get(name) || ""]));
  if (!(choices.language in WORDS)) {
    choices.language = pagesLanguage || (browsersLanguage.toLowerCase().startsWith("zh") ? "zh" : "en");
  }
  return choices;
}

/** Return a table; the first row is its head. Wide ones scroll by themselves. */
function table(rows) {
  const cells = (tag, row) => element("tr", {}, ...row.map((text) => element(tag, {}, text ?? "–")));
  const [head, ...body] = rows;
  return element("div", { class: "wide" },
    element("table", {}, element("thead", {}, cells("th", head)), element("tbody", {}, ...body.map((row) => cells("td", row)))));
}

/** Return the tables before and after training: over all prompts, then, folded, by data source. */
function evaluationTables(runs) {
  const sources = [...new Set(runs.flatMap((run) => Object.keys(run.tables)))];
  if (!sources.length) return [element("p", {}, word("notEvaluated"))];
  const [all, ...others] = [...sources].sort((a, b) => (a === "" ? -1 : b === "" ? 1 : 0));
  if (!others.length) return evaluationTable(runs, all);
  const summary = element("summary", {}, word("sources", { count: others.length }));
  const folded = element("details", {}, summary, ...others.flatMap((source) => evaluationTable(runs, source)));
  return [...evaluationTable(runs, all), folded];
}

/** Return the line and the table of one data source; "" for all prompts. */
function evaluationTable(runs, source) {
  const columns = runs.flatMap((run) => ["before", "after"].filter((when) => (run.tables[source] || {})[when])
    .map((when) => ({ title: `${runs.length > 1 ? `${run.name}, ` : ""}${word(when)}`, ...run.tables[source][when] })));
  const metrics = [...new Set(columns.flatMap((column) => Object.keys(column.numbers)))];
  const cell = (numbers) => numbers && `${numbers[0].toFixed(3)} [${numbers[1].toFixed(3)}, ${numbers[2].toFixed(3)}]`;
  const size = columns.map(({ prompts, samples }) => word("prompts", { prompts, samples }));
  const title = [...(source ? [word("source", { name: source })] : []), ...new Set(size)].join(" · ");
  return [element("p", { class: "soft" }, title),
    table([["", ...columns.map((c) => c.title)], ...metrics.map((m) => [m, ...columns.map((c) => cell(c.numbers[m]))])])];
}

/** Return the table of settings. */
function settingsTable(data) {
  const names = data.runs.map((run) => run.name);
  const head = [word("parameter"), ...names, ...(names.length === 1 ? [word("byDefault")] : [])];
  const title = element("p", { class: "soft" }, word(names.length === 1 ? "settingsOne" : "settingsMany"));
  return [title, data.settings.length ? table([head, ...data.settings]) : element("p", {}, word("settingsNone"))];
}

/** Give a list of choices its lines, and choose one. */
function offer(id, lines, chosen) {
  const list = document.getElementById(id);
  list.replaceChildren(...lines.map(([value, text]) => element("option", { value }, text)));
  list.value = lines.some(([value]) => value === chosen) ? chosen : "";
  list.closest("label").hidden = lines.length < 3; // "all" and one more
  return list.value;
}

/** Fill the page in the reader's language. */
function showPage(data, choices) {
  language = choices.language;
  document.documentElement.lang = language;
  document.getElementById("language").value = language;
  for (const place of document.querySelectorAll("[data-word]")) place.textContent = word(place.dataset.word);
  const legend = data.runs.map((run, i) => element("span", { class: `legend run-${i % COLOURS}` },
    `${run.name} (${word("steps", { steps: run.last_step })})`));
  document.getElementById("runs").replaceChildren(...legend);
  const notes = data.runs.flatMap((run) => run.notes.map((note) => element("li", {}, `${run.name}: ${note}`)));
  document.getElementById("notes").replaceChildren(...notes);
  showCurves(data);
  document.getElementById("evaluation").replaceChildren(...evaluationTables(data.runs));
  document.getElementById("settings").replaceChildren(...settingsTable(data));
  const rounds = [...new Set(data.runs.flatMap((run) => run.rounds.map(([, number]) => String(number))))];
  const all = ["", word("all")];
  choices.run = offer("of-run", [all, ...data.runs.map((run, i) => [String(i), run.name])], choices.run);
  choices.round = offer("of-round", [all, ...rounds.map((round) => [round, round])], choices.round);
  const outcomes = ["right", "mixed", "wrong", "pair"].map((name) => [name, word(name)]);
  choices.outcome = offer("of-outcome", [all, ...outcomes], choices.outcome);
  document.getElementById("of-search").value = choices.search;
  showSamples(data, choices);
}

/** Read the page's data, show it, and follow what the reader chooses. */
function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const choices = choicesOf(location.hash, data.language, navigator.language || "en");
  const keep = () => {
    const kept = new URLSearchParams(CHOICES.filter((name) => choices[name]).map((name) => [name, choices[name]]));
    history.replaceState(null, "", `#${kept}`);
  };
  for (const name of ["run", "round", "outcome"]) {
    document.getElementById(`of-${name}`).addEventListener("change", (event) => {
      choices[name] = event.target.value;
      keep();
      showSamples(data, choices);
    });
  }
  let waiting = 0;
  document.getElementById("of-search").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      choices.search = event.target.value.trim();
      keep();
      showSamples(data, choices);
    }, 200);
  });
  document.getElementById("language").addEventListener("change", (event) => {
    choices.language = event.target.value;
    keep();
    showPage(data, choices);
  });
  document.getElementById("filter").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", () => showPage(data, Object.assign(choices, choicesOf(location.hash, data.language, navigator.language || "en"))));
  showPage(data, choices);
}

if (typeof document !== "undefined") start();
