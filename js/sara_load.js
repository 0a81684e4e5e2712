// The card of Load SaRA Delta: what the chosen file says about itself, before anything is run.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { addBoxWidget, addText, followByAsking, short } from "./sara_chart.js";
import { text } from "./sara_text.js";

const PICTURE = 96;

function selected({ select_from, select_by, fraction }, count, threshold) {
  if (threshold) return text("weights_below", { count, threshold: threshold.toPrecision(3) });
  const told = { count, share: Number((100 * fraction).toPrecision(3)) };
  if (select_by === "gradient") return text("weights_by_gradient", told);
  if (select_from === "each layer") return text("weights_of_each", told);
  return text("weights", { count }); // such as of a merged delta
}

export function lines(told) {
  const settings = JSON.parse(told["sara.settings"] ?? "{}");
  const architecture = (told["modelspec.architecture"] ?? "?").replace(/\/sara$/, "");
  const prediction = told["modelspec.prediction_type"];
  const count = short(Number(told["sara.num_values"]));
  const steps = told["sara.steps"], words = told["modelspec.trigger_phrase"];
  const pictures = settings.batch_size * (settings.grad_accumulation_steps ?? 1);
  return [
    told["modelspec.title"],
    text("made_for", { model: prediction ? `${architecture} (${prediction})` : architecture }),
    selected(settings, count, Number(told["sara.threshold"])),
    steps ? (pictures ? text("steps_of", { steps, pictures }) : text("steps", { steps })) : "",
    words ? text("trigger_words", { words }) : "",
    told["sara.patches_below"]
      ? text("patches_below", { what: told["sara.patches_below"] }) : "",
    told["sara.other_prediction"]
      ? text("other_prediction", { what: told["sara.other_prediction"] }) : "",
    (told["modelspec.date"] ?? "").slice(0, 10),
  ].filter(Boolean).join("\n");
}

async function show(card, widget) {
  const file = widget.value, listed = widget.options?.values ?? [];
  card.file = file;
  let image = "", told = "";
  try {
    const query = new URLSearchParams({ filename: file ?? "" });
    const answer = file ? await api.fetchApi(`/view_metadata/sara?${query}`) : { ok: false };
    const metadata = answer.ok ? await answer.json() : null;
    image = metadata?.["modelspec.thumbnail"] ?? "";
    if (metadata) told = metadata["sara.format"] ? lines(metadata) : text("no_delta");
    else if (file) told = listed.includes(file) ? text("nothing_told") : text("missing_file");
  } catch (error) {
    told = text("unreadable", { error: error.message });
  }
  if (card.file !== file) return; // another one was chosen meanwhile
  const isPicture = image.startsWith("data:image/");
  card.picture.style.display = isPicture ? "block" : "none";
  card.picture.src = isPicture ? image : "";
  card.caption.textContent = told;
}

app.registerExtension({
  name: "SaRA.Load",
  nodeCreated(node) {
    if (node.comfyClass !== "SaraLoadDelta") return;
    const { box } = addBoxWidget(node, "card", () => PICTURE + 8, "sara-card");
    box.style.flexDirection = "row";
    const picture = document.createElement("img");
    picture.alt = "";
    picture.style.cssText =
      `display:none;width:${PICTURE}px;height:${PICTURE}px;object-fit:contain;flex:none;margin:4px`;
    box.append(picture);
    const card = { picture, caption: addText(box), file: null };
    const widget = node.widgets?.find((one) => one.name === "delta_name");
    if (!widget) return;
    followByAsking(node, [widget], () => show(card, widget));
  },
});
