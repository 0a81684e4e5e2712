// The strip of Load SaRA Checkpoints: what a run has kept, with the pictures its files carry, to choose from.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { ACCENT, addBoxWidget, addText, followByAsking, followWidget, scrolls } from "./sara_chart.js";
import { text } from "./sara_text.js";

const HEIGHT = 130, PICTURE = 84;

function stepsIn(widget) {
  return new Set((widget.value ?? "").split(/[\s,]+/).filter(Boolean));
}

function toggle(widget, step) {
  const steps = stepsIn(widget);
  if (!steps.delete(step)) steps.add(step);
  widget.value = [...steps].sort((a, b) => a - b).join(", ");
  widget.callback?.(widget.value);
}

function cell({ step, best, picture, isGone }, card) {
  const button = document.createElement("button"), label = document.createElement("div");
  button.dataset.step = step;
  button.style.cssText = `flex:none;width:${PICTURE + 8}px;margin:0 4px 0 0;padding:2px;cursor:pointer;` +
    "background:none;border-radius:4px;color:var(--input-text,#ddd);font:10px sans-serif";
  if (picture?.startsWith("data:image/")) {
    const image = document.createElement("img");
    image.src = picture;
    image.alt = "";
    image.style.cssText = `display:block;width:${PICTURE}px;height:${PICTURE}px;object-fit:contain`;
    button.append(image);
  }
  label.textContent = best ? text("checkpoint_best", { step }) : text("step", { step });
  if (isGone) {
    button.dataset.gone = "true";
    label.textContent += " (?)";
  }
  button.append(label);
  button.addEventListener("click", (event) => {
    event.stopPropagation();
    toggle(card.steps, String(step));
    mark(card);
  });
  return button;
}

function mark(card) {
  const chosen = stepsIn(card.steps);
  for (const button of [...card.strip.children])
    if (button.dataset.gone && !chosen.has(button.dataset.step)) button.remove();
  const cells = [...card.strip.children].filter((button) => !button.dataset.gone);
  let count = 0;
  for (const button of cells) {
    const isChosen = chosen.has(button.dataset.step);
    count += isChosen;
    button.ariaPressed = isChosen;
    button.style.border = `2px solid ${isChosen ? ACCENT.selected : "transparent"}`;
    button.style.opacity = isChosen || !chosen.size ? 1 : 0.5;
  }
  if (cells.length) card.caption.textContent = chosen.size
    ? text("some_checkpoints", { chosen: count, count: cells.length })
    : text("all_checkpoints", { count: cells.length });
}

async function show(card, widget) {
  const name = card.name = widget.value ?? "";
  let told;
  try {
    const answer = await api.fetchApi(`/sara/checkpoints?${new URLSearchParams({ name })}`);
    told = await answer.json();
  } catch (error) {
    told = { error: error.message };
  }
  if (card.name !== name) return; // another one was chosen meanwhile
  const isChosen = widget.options?.values?.indexOf?.(name) !== 0;
  card.caption.textContent = told.error ? (isChosen ? told.error : text("choose_run")) : "";
  const found = told.checkpoints ?? [], known = new Set(found.map((one) => String(one.step)));
  const gone = [...stepsIn(card.steps)].filter((step) => !known.has(step)); // chosen in another run
  card.strip.replaceChildren(...[...found, ...gone.map((step) => ({ step, isGone: true }))]
    .map((one) => cell(one, card)));
  mark(card);
}

app.registerExtension({
  name: "SaRA.Checkpoints",
  nodeCreated(node) {
    if (node.comfyClass !== "SaraLoadCheckpoints") return;
    const [run, steps] = ["run", "steps"].map((name) => node.widgets?.find((one) => one.name === name));
    if (!run || !steps) return;
    const { box } = addBoxWidget(node, "strip", () => HEIGHT, "sara-checkpoints");
    const strip = document.createElement("div");
    strip.style.cssText = "display:flex;overflow-x:auto;flex:1 1 auto;padding:2px 4px";
    scrolls(strip);
    box.append(strip);
    const card = { strip, steps, caption: addText(box), name: null };
    card.caption.style.minHeight = "0";
    card.caption.style.flex = "none";
    followByAsking(node, [run], () => show(card, run));
    followWidget(node, steps, () => mark(card));
  },
});
