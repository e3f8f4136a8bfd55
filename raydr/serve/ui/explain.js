/* Why a passage was found, of an index of sparse embeddings: a bar for each word that query and passage share, as long as
   what it adds to the score; and the passage's own words, the larger the more they weigh. */

import { el } from "./render.js";

/** The bars, and the words behind a heading that opens them; nothing where nothing was asked for. */
export function explanationElements(explanation) {
  if (!explanation) return [];
  const { score, matches, rest, passage } = explanation;
  const rows = rest > 0 ? [...matches, { token: "other words", weight: rest, others: true }] : matches;
  const longest = Math.max(...rows.map(({ weight }) => weight));
  const bars = el("dl", { className: "matches", ariaLabel: "What made the score" }, ...rows.map(({ token, weight, others }) => {
    const bar = el("i", {});
    bar.style.width = `${(100 * weight) / longest}%`;
    const amount = el("span", { className: "amount" }, weight.toFixed(2));
    return el("div", { title: `${((100 * weight) / score).toFixed(1)} % of ${score.toFixed(2)}` },
      el("dt", { className: others ? "muted" : "" }, token), el("dd", {}, bar, amount));
  }));
  return [...(rows.length ? [bars] : []), ...(passage.length ? [cloud(passage)] : [])];
}

function cloud(words) {
  const weights = words.map(({ weight }) => weight);
  const [least, most] = [Math.min(...weights), Math.max(...weights)];
  const shown = [...words].sort((a, b) => (a.token < b.token ? -1 : 1)).map(({ token, weight }) => {
    const share = most > least ? (weight - least) / (most - least) : 1;
    const word = el("li", { title: `${token}: ${weight.toFixed(2)}` }, token);
    word.style.fontSize = `${0.75 + 0.85 * share}rem`;
    return word;
  });
  return el("details", { className: "cloud" }, el("summary", {}, "The passage's own words"), el("ul", {}, ...shown));
}
