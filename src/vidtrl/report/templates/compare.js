// Prompts and names come from files: they are set as textContent, never as HTML.
const at = (id) => document.getElementById(id);
const players = [at("first"), at("second")];
const CHOICES = [["first", "G", "First better"], ["same", "S", "Same"], ["second", "B", "Second better"]];
let axes = [], pairs = [], index = 0, active = 0;
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
let saving = Promise.resolve(), unsaved = 0;

const done = (pair) => axes.every((axis) => pair.votes[axis]);
const judged = () => pairs.filter(done).length;
const firstOpen = (pair) => Math.max(0, axes.findIndex((axis) => !pair.votes[axis]));
const say = (text) => { at("message").textContent = text; at("message").hidden = !text; };
const element = (name, text = "") => Object.assign(document.createElement(name), { textContent: text });

// Both videos start at the same moment and start again when the longer one has ended.
const seconds = () => Math.max(0, ...players.map((video) => video.duration || 0));
const play = () => {
  // play() is rejected when another pair is shown before it starts, which is no error here
  if (playing && players.every((video) => video.readyState >= 3)) for (const video of players) if (!video.ended) video.play().catch(() => {});
  at("play").textContent = playing ? "Pause" : "Play";
};
const seek = (time) => { for (const video of players) video.currentTime = Math.min(time, video.duration || 0); };
const restart = () => { seek(0); playing = true; play(); };
const toggle = () => {
  playing = !playing;
  if (playing && players.every((video) => video.ended)) seek(0);
  if (!playing) players.forEach((video) => video.pause());
  play();
};
for (const video of players) {
  video.addEventListener("loadedmetadata", () => video.classList.toggle("small", video.videoWidth <= 160));
  video.addEventListener("canplay", play);
  video.addEventListener("ended", () => { if (playing && players.every((other) => other.ended)) restart(); });
  video.addEventListener("timeupdate", () => { if (seconds()) at("scrub").value = Math.max(...players.map((v) => v.currentTime)) / seconds(); });
  video.addEventListener("error", () => { if (video.src) say("A video of this pair cannot be played. Is its file whole, and vidtrl compare still running?"); });
}

const renderVotes = () => {
  const pair = pairs[index];
  [...at("axes").children].forEach((row, i) => {
    row.classList.toggle("active", i === active);
    row.querySelectorAll("button").forEach((button) => button.setAttribute("aria-pressed", pair.votes[axes[i]] === button.dataset.choice));
  });
  at("where").textContent = `Pair ${index + 1} of ${pairs.length}, ${judged()} judged`;
  at("progress").value = judged() / pairs.length;
  at("previous").disabled = index === 0;
  at("next").disabled = index === pairs.length - 1;
};
const show = (i) => {
  index = Math.min(Math.max(i, 0), pairs.length - 1);
  active = firstOpen(pairs[index]);
  // a reload comes back to the same pair
  history.replaceState(null, "", `#${index + 1}`);
  say("");
  at("prompt").textContent = pairs[index].prompt;
  players.forEach((video) => { video.src = `video/${index}/${video.id}`; });
  at("scrub").value = 0;
  renderVotes();
};

const send = async (body) => {
  const answer = await fetch("vote", { method: "POST", body: JSON.stringify(body) });
  if (!answer.ok) throw new Error(await answer.text());
};
const vote = (axis, choice) => {
  const pair = pairs[index], body = { pair: index, axis, choice }, before = pair.votes[axis];
  pair.votes[axis] = choice;
  active = choice && !done(pair) ? firstOpen(pair) : axes.indexOf(axis);
  renderVotes();
  // one after the other: of two votes on an axis the later one must win
  unsaved += 1;
  saving = saving.then(() => send(body)).then(() => say("")).catch((error) => {
    if (pair.votes[axis] === choice) pair.votes[axis] = before;
    renderVotes();
    say(`The vote was not saved (${error.message}). Is vidtrl compare still running?`);
  }).then(() => { unsaved -= 1; return results(); });
};

const results = async () => {
  at("results").hidden = true;
  if (unsaved || judged() < pairs.length) return;
  const answer = await fetch("results");
  const { a, b, axes: table } = await answer.json();
  const signed = (x) => (x > 0 ? "+" : "") + x.toFixed(2).replace("-", "−");
  const row = (kind, cells) => { const tr = element("tr"); tr.append(...cells.map((text) => element(kind, text))); return tr; };
  at("results").querySelector("thead").replaceChildren(row("th", ["", `G: ${a} better`, "S: same", `B: ${b} better`, "GSB"]));
  at("results").querySelector("tbody").replaceChildren(...Object.entries(table).map(([axis, r]) =>
    row("td", [axis.replace("_", " "), r.good, r.same, r.bad, `${signed(r.gsb[0])} (${signed(r.gsb[1])} to ${signed(r.gsb[2])})`])));
  at("results").hidden = false;
};

document.addEventListener("keydown", (event) => {
  if (!pairs.length || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = event.key.toLowerCase(), choice = CHOICES.find(([, name]) => name.toLowerCase() === key);
  // a focused button or slider keeps the keys that work it
  const control = event.target.closest("button, input");
  if (choice) vote(axes[active], choice[0]);
  else if (key === "backspace") vote(axes[active], null);
  else if (key === "r") restart();
  else if (key === "n" || (key === "enter" && !control)) show(index + 1);
  else if (key === "p") show(index - 1);
  else if (key === " " && !control) toggle();
  else if ((key === "arrowdown" || key === "arrowup") && event.target !== at("scrub")) {
    active = (active + (key === "arrowdown" ? 1 : axes.length - 1)) % axes.length;
    renderVotes();
  } else return;
  event.preventDefault();
});
// A button that was clicked with the mouse lets go of the keyboard, or Enter would press it again instead of going on.
document.addEventListener("click", (event) => { if (event.detail) document.activeElement.blur(); });
at("play").addEventListener("click", toggle);
at("scrub").addEventListener("input", () => {
  if (playing) toggle();
  seek(at("scrub").value * seconds());
});
at("previous").addEventListener("click", () => show(index - 1));
at("next").addEventListener("click", () => show(index + 1));

const begin = async () => {
  ({ axes, pairs } = await (await fetch("pairs")).json());
  at("axes").replaceChildren(...axes.map((axis) => {
    const row = Object.assign(element("div"), { className: "axis" }), name = axis.replace("_", " ");
    row.setAttribute("role", "group");
    row.setAttribute("aria-label", name);
    row.append(element("span", name[0].toUpperCase() + name.slice(1)), ...CHOICES.map(([choice, key, text]) => {
      const button = Object.assign(element("button"), { type: "button" });
      button.dataset.choice = choice;
      button.append(element("kbd", key), ` ${text}`);
      button.addEventListener("click", () => vote(axis, choice));
      return button;
    }));
    return row;
  }));
  at("judge").hidden = false;
  const asked = parseInt(location.hash.slice(1), 10), open = pairs.findIndex((pair) => !done(pair));
  show(asked >= 1 && asked <= pairs.length ? asked - 1 : Math.max(open, 0));
  await results();
};
begin().catch((error) => say(`The pairs could not be loaded (${error.message}). Is vidtrl compare still running?`));
