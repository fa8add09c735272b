"use strict";
for (const section of document.querySelectorAll(".browser")) {
  const form = section.querySelector("form");
  const pairs = [...section.querySelectorAll(".pair")];
  const show = () => {
    const { order, tag } = form.elements;
    pairs.sort((a, b) => b.dataset[order.value] - a.dataset[order.value]);
    for (const pair of pairs) {
      pair.hidden = tag.value !== "" && !pair.dataset.tags.split(" ").includes(tag.value);
      section.append(pair);
    }
    form.querySelector("output").textContent = `${pairs.filter((pair) => !pair.hidden).length} of ${pairs.length}`;
  };
  form.hidden = false;
  form.addEventListener("change", show);
  show();
}
