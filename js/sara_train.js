// The chart of SaRA Train: losses, learning rate, marks and time, as the server tells them.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { ACCENT, addCanvasWidget, addText, addWarning, bytes, scrolls } from "./sara_chart.js";
import { follow } from "./sara_shown.js";
import { text } from "./sara_text.js";

const EVENT = "sara.training";
const SMOOTHING = 0.9;
const PREVIEWS_HEIGHT = 220;
const charts = new WeakMap(); // element -> what addCanvasWidget returned; nodes may be proxies

function time(seconds) {
  if (seconds == null) return "?";
  if (seconds < 60) return `${seconds.toPrecision(2)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function smoothed(points) {
  let mean = null;
  return points.map(([step, value]) => {
    mean = mean == null ? value : SMOOTHING * mean + (1 - SMOOTHING) * value;
    return [step, mean];
  });
}

function range(values) {
  const low = Math.min(...values), high = Math.max(...values);
  return high > low ? [low, high] : [low - 0.5 * Math.abs(low) - 1e-9, high + 0.5 * Math.abs(high) + 1e-9];
}

function drawCurve(context, points, toX, toY, colour, width) {
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.beginPath();
  points.forEach(([x, y], i) => context[i ? "lineTo" : "moveTo"](toX(x), toY(y)));
  context.stroke();
}

const left = 44, right = 8, top = 8, bottom = 16; // around what is drawn

function drawFrame(context, width, height, colour, low, high) {
  context.strokeStyle = colour.line;
  context.strokeRect(left, top, width - left - right, height - top - bottom);
  context.fillStyle = colour.faint;
  context.textAlign = "right";
  context.fillText(high.toPrecision(3), left - 4, top + 8);
  context.fillText(low.toPrecision(3), left - 4, height - bottom);
}

// A bar for each noise level: its recent losses, and a line where they were at first.
function drawByNoise(levels, context, width, height, colour) {
  const high = Math.max(...levels.flat().filter((v) => v != null), 1e-9);
  const slot = (width - left - right) / levels.length;
  const toY = (loss) => top + (1 - loss / high) * (height - top - bottom);
  levels.forEach(([first, recent], i) => {
    const x = left + i * slot;
    context.fillStyle = ACCENT.smooth;
    if (recent != null) context.fillRect(x + 2, toY(recent), slot - 4, height - bottom - toY(recent));
    context.fillStyle = ACCENT.validation;
    if (first != null) context.fillRect(x + 2, toY(first) - 1, slot - 4, 2);
  });
  drawFrame(context, width, height, colour, 0, high);
  context.fillText(text("much_noise"), width - right, height - 4);
  context.textAlign = "left";
  context.fillText(text("little_noise"), left, height - 4);
}

function draw(state, byNoise, context, width, height, colour) {
  if (!state || !state.losses.length) {
    context.fillStyle = colour.faint;
    context.fillText(text("train_first"), left, height / 2);
    return;
  }
  if (byNoise && state.by_noise?.length) {
    drawByNoise(state.by_noise, context, width, height, colour);
    return;
  }
  const all = [...state.losses, ...state.validation].map((p) => p[1]).filter(Number.isFinite);
  const sorted = [...all].sort((a, b) => a - b);
  const cut = sorted[Math.floor(0.995 * (sorted.length - 1))]; // single spikes are cut off
  const [low, high] = range(all.filter((v) => v <= cut));
  const toX = (step) => left + (step / state.steps) * (width - left - right);
  const toY = (loss) =>
    top + (1 - (Math.min(loss, high) - low) / (high - low)) * (height - top - bottom);
  drawFrame(context, width, height, colour, low, high);
  context.fillText(String(state.steps), width - right, height - 4);
  context.textAlign = "left";
  context.fillText("0", left, height - 4);
  const rates = state.rates.map((p) => p[1]);
  const [, fastest] = range(rates);
  drawCurve(context, state.rates, toX,
    (rate) => height - bottom - (rate / fastest) * 0.25 * (height - top - bottom), colour.line, 1);
  for (const [step, kind] of state.marks) {
    context.strokeStyle = ACCENT[kind];
    context.beginPath();
    context.moveTo(toX(step), kind === "saved" ? height - bottom - 6 : top);
    context.lineTo(toX(step), height - bottom);
    context.stroke();
  }
  drawCurve(context, state.losses, toX, toY, ACCENT.raw + "88", 1);
  drawCurve(context, smoothed(state.losses), toX, toY, ACCENT.smooth, 2);
  drawCurve(context, state.validation, toX, toY, ACCENT.validation, 2);
  for (const [step, loss] of state.validation) {
    context.fillStyle = ACCENT.validation;
    context.fillRect(toX(step) - 2, toY(loss) - 2, 4, 4);
  }
}

function describe(state) {
  const last = smoothed(state.losses).at(-1)?.[1];
  const { run, step, steps, stage } = state;
  const lines = [
    text("progress", { run, step, steps, stage, status: text(state.status) }),
    [
      last == null ? "" : text("loss", { value: last.toFixed(4) }),
      state.validation.length
        ? text("validation", { value: state.validation.at(-1)[1].toFixed(4) }) : "",
      state.rates.length
        ? text("learning_rate", {
          value: state.rates.at(-1)[1].toExponential(2),
          highest: Math.max(...state.rates.map(([, rate]) => rate)).toExponential(2),
        }) : "",
    ].filter(Boolean).join(", "),
    [
      state.seconds_per_step == null ? "" : text("per_step", { time: time(state.seconds_per_step) }),
      state.status === "training" ? text("left", { time: time(state.seconds_left) }) : "",
      text("memory", { used: bytes(state.memory_used), total: bytes(state.memory_total) }),
    ].filter(Boolean).join(", "),
    [
      state.epochs ? text("epochs", { count: Math.round(10 * state.epochs) / 10 }) : "",
      state.memory_need ? text("memory_need", Object.fromEntries(
        Object.entries(state.memory_need).map(([name, size]) => [name, bytes(size)]))) : "",
    ].filter(Boolean).join(", "),
  ];
  const ending = state.marks.filter((mark) => ["error", "cancelled"].includes(mark[1])).at(-1);
  if (ending) lines.push(`${text("step", { step: ending[0] })}: ${ending[2]}`);
  return lines.filter(Boolean).join("\n");
}

// Rows of previews, the newest on top; a click opens one in a tab of its own.
function showPreviews(chart, state) {
  if (chart.started !== state.started) { // another run, perhaps in a folder of the same name
    chart.started = state.started;
    chart.previews.replaceChildren();
  }
  const shown = new Set([...chart.previews.children].map((row) => row.dataset.file));
  for (const [step, file] of state.previews) {
    if (shown.has(file)) continue;
    const row = document.createElement("a"), label = document.createElement("div");
    const picture = document.createElement("img");
    const query = new URLSearchParams({
      filename: file, subfolder: state.preview_folder, type: "output", started: state.started,
    });
    row.dataset.file = file;
    row.href = picture.src = api.apiURL(`/view?${query}`);
    row.target = "_blank";
    row.style.cssText = "display:block;color:inherit;text-decoration:none";
    label.textContent = text("step", { step });
    picture.alt = label.textContent;
    picture.loading = "lazy"; // of a long run there are hundreds
    picture.decoding = "async";
    picture.style.cssText = "display:block;max-width:100%;min-width:min(100%,160px);min-height:40px";
    row.append(label, picture);
    chart.previews.prepend(row);
  }
  chart.previews.style.display = chart.previews.children.length ? "block" : "none";
}

const BUTTON = "flex:1;font:11px sans-serif;cursor:pointer;padding:2px;border-radius:4px;" +
  "color:var(--input-text,#ddd);background:var(--comfy-input-bg,#222);border:1px solid var(--border-color,#555)";

// A button that turns the drawing over, between the loss over the steps and by noise level.
function addTurn(chart) {
  const button = document.createElement("button");
  button.className = "sara-turn";
  button.title = text("by_noise_help");
  button.style.cssText = `${BUTTON};flex:none;align-self:flex-end;display:none;margin:0 4px`;
  button.addEventListener("click", (event) => {
    event.stopPropagation();
    chart.byNoise = !chart.byNoise;
    showTurn(chart);
    chart.redraw();
  });
  chart.box.insertBefore(button, chart.caption);
  return button;
}

function showTurn(chart) {
  chart.turn.textContent = chart.byNoise ? text("over_steps") : text("by_noise");
  chart.turn.style.display = chart.state?.by_noise?.length ? "block" : "none";
}

// Buttons that ask the run to do something after its present step; they are there while it trains.
function addWishes(box) {
  const row = document.createElement("div");
  row.className = "sara-wishes";
  row.style.cssText = "display:none;gap:4px;padding:2px 4px;flex:none";
  const answer = addText(box);
  answer.style.display = "none";
  const labels = {
    save: [text("wish_save"), text("wish_save_help")],
    preview: [text("wish_preview"), text("wish_preview_help")],
    end: [text("wish_end"), text("wish_end_help")],
  };
  for (const [wish, [label, help]] of Object.entries(labels)) {
    const button = document.createElement("button");
    button.dataset.wish = wish;
    button.textContent = label;
    button.title = help;
    button.style.cssText = BUTTON;
    button.addEventListener("click", async (event) => {
      event.stopPropagation();
      button.disabled = true; // until the next step tells that it was heard
      const query = new URLSearchParams({ run: row.dataset.run, wish });
      let problem;
      try {
        const response = await api.fetchApi(`/sara/ask?${query}`, { method: "POST" });
        ({ problem } = await response.json());
      } catch (error) {
        problem = String(error);
      }
      answer.textContent = problem ?? "";
      answer.style.display = problem ? "block" : "none";
    });
    row.append(button);
  }
  box.append(row);
  return row;
}

function showWishes(row, state) {
  row.style.display = state.status === "training" ? "flex" : "none";
  row.dataset.run = state.run;
  for (const button of row.children) {
    button.disabled = false;
    button.style.display = button.dataset.wish !== "preview" || state.can_preview ? "block" : "none";
  }
}

function show(node, state) {
  const chart = charts.get(node.widgets?.find((widget) => widget.name === "chart")?.element);
  if (!chart || !state) return;
  chart.state = state;
  chart.caption.textContent = describe(state);
  chart.warnings.textContent = (state.warnings ?? []).join("\n");
  chart.warnings.style.display = chart.warnings.textContent ? "block" : "none";
  showTurn(chart);
  showWishes(chart.wishes, state);
  showPreviews(chart, state);
  chart.fit();
  chart.redraw();
}

const charted = follow("sara_training", show);

app.registerExtension({
  name: "SaRA.Train",
  async setup() {
    api.addEventListener(EVENT, (event) => charted.receive(event.detail));
    await charted.load();
  },
  nodeCreated(node) {
    if (node.comfyClass !== "SaraTrain") return;
    const previews = document.createElement("div");
    const chart = addCanvasWidget(
      node, "chart", 175,
      (context, width, height, colour) => draw(chart?.state, chart?.byNoise, context, width, height, colour));
    chart.turn = addTurn(chart);
    chart.wishes = addWishes(chart.box);
    chart.warnings = addWarning(chart.box);
    chart.warnings.className = "sara-warnings";
    chart.warnings.style.display = "none";
    previews.className = "sara-previews";
    previews.dataset.height = PREVIEWS_HEIGHT;
    scrolls(previews);
    previews.style.cssText =
      `display:none;flex:1 1 ${PREVIEWS_HEIGHT}px;min-height:0;overflow-y:auto;padding:2px 4px;` +
      "font:11px sans-serif;color:var(--input-text,#ddd)";
    chart.box.append(previews);
    chart.previews = previews;
    charts.set(chart.box, chart);
  },
  async afterConfigureGraph() {
    charted.again();
  },
});
