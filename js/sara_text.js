// What the widgets say, in the language of the page; locales/<language>/main.json holds it.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const FALLBACK = "en";
let told = {};
try {
  told = await (await api.fetchApi("/i18n")).json();
} catch (error) {
  console.warn("SaRA: texts could not be loaded, their keys are shown", error);
}

// The text of a key, with `{name}` replaced by the value of that name.
export function text(key, values = {}) {
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? FALLBACK;
  const [general] = language.split("-"); // of zh-TW, zh
  const found = told[language]?.sara?.[key] ?? told[general]?.sara?.[key] ?? told[FALLBACK]?.sara?.[key] ?? key;
  return found.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}
