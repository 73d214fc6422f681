"use strict";

// The page's words in both languages. {name} is replaced by a value.
const WORDS = {
  en: {
    language: "Language",
    curves: "Curves",
    curvesNote: "Green: the healthy range. Dotted lines: a self-play round begins. Thin: each step; bold: a running mean over 9 points of a round. Touch or point at a curve to read it.",
    healthy: "healthy: {range}",
    above: "above {low}",
    below: "below {high}",
    between: "{low} to {high}",
    rises: "rises",
    falls: "falls",
    step: "step",
    others: "other",
    evaluation: "Before and after training",
    prompts: "{prompts} prompts, {samples} samples each, 95 % intervals",
    before: "before",
    after: "after",
    notEvaluated: "Nothing was evaluated.",
    source: "Data source {name}",
    sources: "By data source ({count})",
    settings: "Settings",
    settingsOne: "Those that are not the default:",
    settingsMany: "Those in which the runs differ:",
    settingsNone: "None.",
    parameter: "parameter",
    byDefault: "default",
    samples: "Samples",
    noSamples: "No samples were kept (trainer.sample_rows).",
    run: "Run",
    round: "Round",
    outcome: "Responses",
    search: "Search",
    all: "all",
    right: "all right",
    mixed: "right and wrong",
    wrong: "all wrong",
    pair: "with a pair",
    found: "{found} of {all} groups",
    more: "Show more",
    groupTitle: "step {step} · round {round}",
    truth: "ground truth: {truth}",
    chosen: "chosen",
    rejected: "rejected",
    fork: "the responses part here",
    times: "× {times}",
    steps: "{steps} steps",
  },
  zh: {
    language: "语言",
    curves: "曲线",
    curvesNote: "绿色：健康范围。虚线：一轮自对弈开始。细线：每一步的值；粗线：同一轮内 9 个点的滑动平均。触摸或指向曲线可读数值。",
    healthy: "健康范围：{range}",
    above: "高于 {low}",
    below: "低于 {high}",
    between: "{low} 到 {high}",
    rises: "上升",
    falls: "下降",
    step: "步",
    others: "其他",
    evaluation: "训练前后",
    prompts: "{prompts} 个 prompt，每个采样 {samples} 次，95 % 区间",
    before: "训练前",
    after: "训练后",
    notEvaluated: "没有做评估。",
    source: "数据来源 {name}",
    sources: "按数据来源（{count}）",
    settings: "参数",
    settingsOne: "与默认值不同的参数：",
    settingsMany: "各次训练之间不同的参数：",
    settingsNone: "没有。",
    parameter: "参数",
    byDefault: "默认值",
    samples: "样本",
    noSamples: "没有保存样本（trainer.sample_rows）。",
    run: "训练",
    round: "轮次",
    outcome: "回复",
    search: "搜索",
    all: "全部",
    right: "全对",
    mixed: "有对有错",
    wrong: "全错",
    pair: "有偏好对",
    found: "{all} 组中的 {found} 组",
    more: "显示更多",
    groupTitle: "第 {step} 步 · 第 {round} 轮",
    truth: "标准答案：{truth}",
    chosen: "选中",
    rejected: "落选",
    fork: "两个回复从这里分开",
    times: "× {times}",
    steps: "{steps} 步",
  },
};

let language = "en";

/** Return a text of the page in the reader's language, its {names} replaced. */
function word(key, values = {}) {
  return WORDS[language][key].replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

/** Make an element. Children that are no elements become text: nothing is ever read as markup. */
function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Make an element of a picture. */
function drawn(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Return a number in at most three digits that count. */
function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= unit) return `${Number((value / (letter === "k" ? 1e3 : unit)).toPrecision(3))}${letter}`;
  }
  return size !== 0 && size < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}
