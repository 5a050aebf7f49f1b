"""The page a rater opens: one file, offline, blind. Texts reach it as JSON and the screen as
textContent, never as markup."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5f656d; --line: #dcdfe3; --paper: #fff; --shade: #f5f6f8; --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --soft: #a0a7b0; --line: #3a3f46; --paper: #16181b; --shade: #202327; --mark: #4ba3dc; }
}
body { margin: 1.2rem auto; padding: 0 1.2rem; max-width: 80rem; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
header { display: flex; gap: 1rem; align-items: center; }
progress { flex: 1; accent-color: var(--mark); }
h1 { font-size: 1.15rem; margin: .9rem 0 .4rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
#question { background: var(--shade); padding: .6rem .8rem; max-height: 30vh; overflow-y: auto; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin: 1rem 0; }
.two > section { border: 2px solid var(--line); border-radius: 4px; padding: .4rem .8rem; min-width: 0; }
.two h2 { font-size: .9rem; margin: .2rem 0; color: var(--soft); }
.two .text { max-height: 50vh; overflow-y: auto; }
section.chosen { border-color: var(--mark); }
button { font: inherit; padding: .35rem .9rem; margin: 0 .4rem .4rem 0; }
button.chosen { outline: 3px solid var(--mark); }
.soft { color: var(--soft); font-size: .9rem; }
textarea { width: 100%; height: 9rem; box-sizing: border-box; }
@media (max-width: 45rem) { .two { grid-template-columns: 1fr; } }
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const key = "annotation " + data.study + " " + data.rater;
const KEYS = {"1": "left", "2": "right", "0": "tie"};
let state = {at: 0, ratings: {}, turn: 0};
let keeps = true;

// Two places: the browser's store outlives the tab; the tab's own history entry is there after every reload, also where the store is not.
// (Chromium now and then gives a file:// page an empty store of its own for one load.) The later of the two counts.
function take(kept) {
  if (kept === null || kept.key !== key || typeof kept.at !== "number" || typeof kept.ratings !== "object" || kept.ratings === null) return;
  if (kept.turn > state.turn) state = kept;
}

function keep() {
  state.turn += 1;
  state.key = key;
  try { history.replaceState(state, ""); } catch (error) { /* browsers allow a hundred in half a minute */ }
  try { localStorage.setItem(key, JSON.stringify(state)); } catch (error) { keeps = false; }
}

take(history.state);
try {
  localStorage.setItem(key + " probe", "");  // never the state itself: nothing is overwritten before there is something to keep
  take(JSON.parse(localStorage.getItem(key)));
} catch (error) { keeps = false; }
if (state.turn > 0) keep();

function rated() { return data.items.filter(item => item.id in state.ratings).length; }

function exported() {
  const ratings = data.items.filter(item => item.id in state.ratings).map(item => ({pair: item.id, choice: state.ratings[item.id]}));
  return JSON.stringify({format: data.format, study: data.study, rater: data.rater, ratings: ratings, of: data.items.length}, null, 1);
}

function show() {
  const done = rated(), item = data.items[Math.min(state.at, data.items.length - 1)];
  const ended = state.at >= data.items.length;
  at("progress").max = data.items.length;
  at("progress").value = done;
  at("unkept").hidden = keeps;
  at("count").textContent = done + " of " + data.items.length;
  at("pair").hidden = ended;
  at("end").hidden = !ended;
  at("title").textContent = ended ? "" : "Pair " + (state.at + 1);
  at("ask").textContent = item.ask;
  at("question").textContent = item.question;
  const choice = state.ratings[item.id];
  for (const side of ["left", "right"]) {
    at(side).textContent = item[side] === "" ? "(empty)" : item[side];
    at(side).scrollTop = 0;
  }
  at("question").scrollTop = 0;
  for (const name of ["left", "right", "tie"]) at("choose-" + name).classList.toggle("chosen", choice === name);
  for (const side of ["left", "right"]) at("box-" + side).classList.toggle("chosen", choice === side);
  at("back").disabled = state.at === 0;
  at("forward").disabled = ended || choice === undefined;
  at("text").value = exported();
  at("missing").textContent = done < data.items.length ? "Not all pairs are rated yet: go back with the left arrow key." : "";
}

function move(step) {
  if (step > 0 && (state.at >= data.items.length || !(data.items[state.at].id in state.ratings))) return;
  state.at = Math.max(0, Math.min(data.items.length, state.at + step));
  keep(); show();
}

function choose(choice) {
  if (state.at >= data.items.length) return;
  state.ratings[data.items[state.at].id] = choice;
  state.at += 1;
  keep(); show();
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([exported()], {type: "application/json"}));
  link.download = "ratings_" + data.rater + ".json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

document.addEventListener("keydown", event => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.target === at("text")) return;
  if (event.key in KEYS) choose(KEYS[event.key]);
  else if (event.key === "ArrowLeft") move(-1);
  else if (event.key === "ArrowRight") move(1);
  else return;
  event.preventDefault();
});
for (const name of ["left", "right", "tie"]) at("choose-" + name).addEventListener("click", () => choose(name));
at("back").addEventListener("click", () => move(-1));
at("forward").addEventListener("click", () => move(1));
at("download").addEventListener("click", download);
at("download-end").addEventListener("click", download);
show();
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-@HASH@'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Which answer is better?</title>
<style>@STYLE@</style>
</head>
<body>
<header><progress id="progress" value="0" max="1"></progress><span id="count"></span><button id="download">Export</button></header>
<p class="soft" id="unkept" hidden>
This browser keeps nothing: closing or reloading the page loses your ratings. Export before you leave.</p>
<main id="pair">
<h1 id="title"></h1>
<p id="ask"></p>
<div class="text" id="question"></div>
<div class="two">
<section id="box-left"><h2>Left</h2><div class="text" id="left"></div></section>
<section id="box-right"><h2>Right</h2><div class="text" id="right"></div></section>
</div>
<p><button id="choose-left">1 · left is better</button><button id="choose-tie">0 · equally good</button>
<button id="choose-right">2 · right is better</button></p>
<p class="soft">Keys: 1, 2, 0; arrows to go back and forward. Ratings are kept in this browser.
<button id="back">← back</button><button id="forward">forward →</button></p>
</main>
<main id="end" hidden>
<h1>Thank you.</h1>
<p id="missing"></p>
<p><button id="download-end">Export ratings</button></p>
<p class="soft">If nothing was saved, copy this text into a file and send that:</p>
<textarea id="text" readonly spellcheck="false"></textarea>
</main>
<script type="application/json" id="data">@DATA@</script>
<script>@SCRIPT@</script>
</body>
</html>
"""


def rater_page(data: Mapping[str, Any]) -> str:
    """The page with its data: {format, study, rater, items: [{id, ask, question, left, right}]}. It
    allows no script but its own."""
    # no tag can start in it
    encoded = (
        json.dumps(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    )
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    page = PAGE.replace("@HASH@", digest).replace("@STYLE@", STYLE).replace("@SCRIPT@", SCRIPT)
    return page.replace("@DATA@", encoded)  # last: a text may hold any of the marks
