"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const key = "annotation " + data.study + " " + data.rater;
const KEYS = {"1": "left", "2": "right", "0": "tie"};
let state = {at: 0, ratings: {}, turn: 0};
let keeps = true;

// The state is kept in two places. The browser's local storage outlives the tab; the tab's history
// entry survives a reload even without local storage. (Chromium now and then gives a file:// page
// an empty store for one load.) The later state of the two counts.
function take(kept) {
  if (kept === null || kept.key !== key || typeof kept.at !== "number") return;
  if (typeof kept.ratings !== "object" || kept.ratings === null) return;
  if (kept.turn > state.turn) state = kept;
}

function keep() {
  state.turn += 1;
  state.key = key;
  // browsers allow a hundred calls in half a minute
  try { history.replaceState(state, ""); } catch (error) {}
  try { localStorage.setItem(key, JSON.stringify(state)); } catch (error) { keeps = false; }
}

take(history.state);
try {
  // a probe, not the state: nothing is overwritten before there is a rating
  localStorage.setItem(key + " probe", "");
  take(JSON.parse(localStorage.getItem(key)));
} catch (error) { keeps = false; }
if (state.turn > 0) keep();

function rated() { return data.items.filter(item => item.id in state.ratings).length; }

function exported() {
  const ratings = data.items.filter(item => item.id in state.ratings)
    .map(item => ({pair: item.id, choice: state.ratings[item.id]}));
  const {format, study, rater} = data;
  return JSON.stringify({format, study, rater, ratings, of: data.items.length}, null, 1);
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
  for (const name of ["left", "right", "tie"]) {
    at("choose-" + name).classList.toggle("chosen", choice === name);
  }
  for (const side of ["left", "right"]) {
    at("box-" + side).classList.toggle("chosen", choice === side);
  }
  at("back").disabled = state.at === 0;
  at("forward").disabled = ended || choice === undefined;
  at("text").value = exported();
  const missing = "Not all pairs are rated yet: go back with the left arrow key.";
  at("missing").textContent = done < data.items.length ? missing : "";
}

function move(step) {
  const ended = state.at >= data.items.length;
  if (step > 0 && (ended || !(data.items[state.at].id in state.ratings))) return;
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
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target === at("text")) return;
  if (event.key in KEYS) choose(KEYS[event.key]);
  else if (event.key === "ArrowLeft") move(-1);
  else if (event.key === "ArrowRight") move(1);
  else return;
  event.preventDefault();
});
for (const name of ["left", "right", "tie"]) {
  at("choose-" + name).addEventListener("click", () => choose(name));
}
at("back").addEventListener("click", () => move(-1));
at("forward").addEventListener("click", () => move(1));
at("download").addEventListener("click", download);
at("download-end").addEventListener("click", download);
show();
