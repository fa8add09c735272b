"use strict";
for (const section of document.querySelectorAll(".browser")) {
  const form = section.querySelector("form");
  const pairs = [...section.querySelectorAll(".pair")];
  const matches = (pair, { tag, subset, model, verdict, text }) =>
    (tag.value === "" || pair.dataset.tags.split(" ").includes(tag.value)) &&
    (!subset || subset.value === "" || pair.dataset.subset === subset.value) &&
    ((model.value === "" && verdict.value === "") || JSON.parse(pair.dataset.verdicts).some(([name, ...words]) =>
      (model.value === "" || name === model.value) && (verdict.value === "" || words.includes(verdict.value)))) &&
    pair.textContent.toLowerCase().includes(text.value.toLowerCase());
  const show = () => {
    const order = form.elements.order.value;
    pairs.sort((a, b) => b.dataset[order] - a.dataset[order]);
    for (const pair of pairs) {
      pair.hidden = !matches(pair, form.elements);
      section.append(pair);
    }
    form.querySelector("output").textContent = `${pairs.filter((pair) => !pair.hidden).length} of ${pairs.length}`;
  };
  form.hidden = false;
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}
