"use strict";
// Votes on pairs of videos. They are kept in the browser, under the study's name, until they are saved to a file.
const root = document.getElementById("study"), { study, pairs } = JSON.parse(root.dataset.study);
const find = selector => root.querySelector(selector);
const sections = { start: find(".start"), vote: find(".vote"), end: find(".end") };
const videos = [find("video.left"), find("video.right")], trouble = find(".trouble");
const place = `vpo-study-${study}`;
const choices = ["left", "right", "tie"];
let state = { rater: "", votes: {} }, current = 0, since = 0, keeps = true;

try {
  const kept = JSON.parse(localStorage.getItem(place));
  if (kept && typeof kept.rater === "string" && kept.votes) state = kept;
  localStorage.setItem(place, JSON.stringify(state));
} catch {
  keeps = false;
  find(".storage").hidden = false;
}
const keep = () => { if (keeps) localStorage.setItem(place, JSON.stringify(state)); };

const showSection = name => {
  for (const [each, section] of Object.entries(sections)) section.hidden = each !== name;
  if (name !== "vote") for (const video of videos) video.pause();
};
const playing = () => !videos[0].paused;
const play = () => {
  for (const video of videos) video.play().catch(() => { find(".pause").textContent = "Play"; });
  find(".pause").textContent = "Pause";
};
const pause = () => {
  for (const video of videos) video.pause();
  find(".pause").textContent = "Play";
};
const together = () => {  // both begin at the same moment, when both can be played
  if (videos.every(video => video.readyState >= 3)) {
    for (const video of videos) video.currentTime = 0;
    play();
  }
};

const show = index => {
  current = index;
  const pair = pairs[index];
  find(".count").textContent = `${index + 1} of ${pairs.length}`;
  find("progress").value = Object.keys(state.votes).length;
  find(".text").textContent = pair.prompt;
  trouble.hidden = true;
  videos[0].src = pair.left;
  videos[1].src = pair.right;
  for (const video of videos) video.load();
  for (const button of root.querySelectorAll(".choose")) {
    button.classList.toggle("chosen", state.votes[pair.id]?.choice === button.dataset.choice);
  }
  find(".back").disabled = index === 0;
  since = performance.now();
  showSection("vote");
};
const choose = choice => {
  if (sections.vote.hidden || !choices.includes(choice)) return;
  const seconds = Math.round((performance.now() - since) / 100) / 10;
  state.votes[pairs[current].id] = { choice, seconds };
  keep();
  const next = current + 1;
  if (next < pairs.length) show(next); else finish();
};
const finish = () => {
  const open = pairs.findIndex(pair => !(pair.id in state.votes));
  if (open >= 0) { show(open); return; }
  find(".saved").textContent = "";
  showSection("end");
};
const back = () => { if (!sections.vote.hidden && current > 0) show(current - 1); };

const content = () => ({
  study,
  rater: state.rater,
  complete: pairs.every(pair => pair.id in state.votes),
  votes: pairs.filter(pair => pair.id in state.votes).map(pair => ({ pair: pair.id, ...state.votes[pair.id] })),
});
const save = () => {
  const url = URL.createObjectURL(new Blob([`${JSON.stringify(content(), null, 1)}\n`], { type: "application/json" }));
  const link = document.createElement("a");
  link.href = url;
  link.download = `votes-${study}-${state.rater.replace(/[^\w-]+/g, "-")}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
  find(".saved").textContent = `Saved as ${link.download}, where this browser keeps downloads.`;
};

find("form").addEventListener("submit", event => {
  event.preventDefault();
  const rater = find("#rater").value.trim();
  if (!rater) return;
  if (rater !== state.rater) state = { rater, votes: {} };  // another person at the same computer begins anew
  keep();
  finish();
});
for (const button of root.querySelectorAll(".choose")) button.addEventListener("click", () => choose(button.dataset.choice));
for (const video of videos) {
  video.addEventListener("canplay", together);
  video.addEventListener("click", () => playing() ? pause() : play());
  video.addEventListener("error", () => {
    trouble.textContent = "This browser cannot play one of the videos. Open the page in another browser; your votes so far can be saved.";
    trouble.hidden = false;
  });
}
videos[0].addEventListener("timeupdate", () => {  // the right video follows the left one
  if (Math.abs(videos[1].currentTime - videos[0].currentTime) > 0.15 && videos[1].duration > videos[0].currentTime) {
    videos[1].currentTime = videos[0].currentTime;
  }
});
find(".pause").addEventListener("click", () => playing() ? pause() : play());
find(".back").addEventListener("click", back);
find(".again").addEventListener("click", () => show(0));
for (const button of root.querySelectorAll(".save")) button.addEventListener("click", save);

const keys = { ArrowLeft: () => choose("left"), ArrowRight: () => choose("right"), ArrowDown: () => choose("tie"), ArrowUp: back };
document.addEventListener("keydown", event => {
  if (sections.vote.hidden || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " " && event.target.tagName !== "BUTTON") {
    event.preventDefault();
    playing() ? pause() : play();
  } else if (keys[event.key]) {
    event.preventDefault();
    keys[event.key]();
  }
});

find("#rater").value = state.rater;
showSection("start");
