"use strict";
const $ = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
document.body.classList.add("scripted");

// ---- charts: the values at the nearest step, under the pointer or, with a focused chart, by the arrow keys
const spell = (value) => String(parseFloat(value.toPrecision(4))).replace("-", "−");
for (const svg of document.querySelectorAll(".chart svg")) {
  const { x: [xLow, xHigh], y: [yLow, yHigh], lines } = JSON.parse(svg.dataset.points);
  const [left, right, top, bottom] = JSON.parse(svg.dataset.frame);
  const steps = [...new Set(lines.flatMap(([, points]) => points.map(([x]) => x)))].sort((a, b) => a - b);
  if (!steps.length) continue;
  const toX = (x) => left + (x - xLow) / (xHigh - xLow) * (right - left);
  const toY = (y) => bottom - (y - yLow) / (yHigh - yLow) * (bottom - top);
  const draw = (tag, attributes) => {
    const element = document.createElementNS(svg.namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const marks = draw("g", {}), tip = make("output", { hidden: true });
  let at = steps.length - 1;
  const hide = () => { tip.hidden = true; marks.replaceChildren(); };
  const show = (index) => {
    at = Math.min(Math.max(index, 0), steps.length - 1);
    const x = toX(steps[at]);
    marks.replaceChildren(draw("line", { class: "cursor", x1: x, x2: x, y1: top, y2: bottom }));
    tip.replaceChildren(make("div", { textContent: `${svg.dataset.x} ${String(parseFloat(steps[at].toPrecision(6))).replace("-", "−")}` }));
    lines.forEach(([name, points], k) => {
      const point = points.find(([value]) => value === steps[at]);
      if (!point) return;
      marks.append(draw("circle", { class: `mark f${k}`, cx: x, cy: toY(point[1]), r: 4 }));
      tip.append(make("div", {}, make("i", { className: `b${k}` }), make("span", { textContent: name }), make("b", { textContent: spell(point[1]) })));
    });
    tip.hidden = false;
    // beside the cursor, on the side with more room
    const scale = svg.clientWidth / svg.viewBox.baseVal.width, isLeft = x < (left + right) / 2;
    tip.style.top = `${svg.getBoundingClientRect().top - tip.parentElement.getBoundingClientRect().top + top * scale}px`;
    tip.style.left = isLeft ? `${x * scale + 8}px` : "auto";
    tip.style.right = isLeft ? "auto" : `${tip.parentElement.clientWidth - x * scale + 8}px`;
  };
  const point = (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const distances = steps.map((step) => Math.abs(toX(step) - x));
    show(distances.indexOf(Math.min(...distances)));
  };
  svg.append(marks);
  svg.after(tip);
  svg.querySelectorAll("title").forEach((title) => title.remove());  // the browser's own tooltip would lie over this one
  svg.setAttribute("tabindex", 0);
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", () => { if (document.activeElement !== svg) hide(); });
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) show(at); });
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const target = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (event.key === "Escape") hide();
    else if (target !== undefined) show(target);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
}

// ---- the results table: a click on a heading sorts, missing values stay last
for (const table of document.querySelectorAll("table.results")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = make("button", { type: "button" }, head.firstChild);
    head.prepend(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => Number.parseFloat(row.cells[column].dataset.value ?? "NaN");
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return up ? x - y : y - x;
      });
      body.append(...rows);
    });
  });
}

// ---- all visible videos as one player. A browser allows a page a limited number of decoders, so a video has its
// source only while it is near the viewport
const player = {
  playing: !matchMedia("(prefers-reduced-motion: reduce)").matches,
  position: 0,
  length: 0, // of the longest video; kept while none is ready, as right after a seek
  rate: 1,
  active: new Set(),
  ready() { return [...this.active].filter((v) => v.readyState >= 2 && Number.isFinite(v.duration)); },
  leader() { return this.ready().reduce((a, v) => (a && a.duration >= v.duration ? a : v), null); },
  measure() {
    const lengths = [...this.active].filter((v) => v.readyState >= 1 && Number.isFinite(v.duration)).map((v) => v.duration);
    if (lengths.length) this.length = Math.max(...lengths);
    return this.length;
  },
  seek(seconds) {
    this.position = seconds;
    for (const v of this.active) if (v.readyState >= 1) v.currentTime = Math.min(seconds, v.duration);
  },
  set(playing) {
    this.playing = playing;
    $("play").textContent = playing ? "Pause all" : "Play all";
    for (const v of this.active) if (playing) this.start(v); else v.pause();
    if (!playing) this.seek(this.position);
  },
  start(v) {
    v.playbackRate = this.rate;
    // rejected when the video scrolls away before it starts, which is no error here
    if (this.playing && v.readyState >= 1 && !v.ended) v.play().catch(() => {});
  },
  enter(v) {
    if (!v.getAttribute("src")) v.src = v.dataset.src;
    v.preload = "auto";
    this.active.add(v);
    if (v.readyState >= 1) this.join(v);
  },
  join(v) {
    v.currentTime = Math.min(this.position, v.duration);
    this.start(v);
  },
  leave(v) {
    if (!this.active.delete(v)) return;
    v.pause();
    v.removeAttribute("src");
    v.load();
  },
  tick() {
    const leader = this.leader();
    $("transport").hidden = this.active.size === 0;
    if (leader && this.playing) {
      if (leader.ended) { this.seek(0); for (const v of this.active) this.start(v); }
      else this.position = leader.currentTime;
      for (const v of this.ready()) {
        if (v === leader || v.seeking) continue;
        if (Math.abs(v.currentTime - Math.min(this.position, v.duration)) > 0.2) this.join(v);
      }
    }
    const length = this.measure();
    if (length) {
      if (document.activeElement !== $("scrub") || this.playing) $("scrub").value = 1000 * this.position / length;
      const clock = `${this.position.toFixed(2)} / ${length.toFixed(2)} s`;
      if ($("clock").textContent !== clock) $("clock").textContent = clock;
    }
    requestAnimationFrame(() => this.tick());
  },
};
const videos = [...document.querySelectorAll(".columns video")];
if ($("transport")) {
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting) player.enter(target); else player.leave(target);
  }, { rootMargin: "100px" });
  for (const v of videos) {
    v.dataset.src = v.getAttribute("src");
    v.removeAttribute("src");
    v.controls = v.loop = false; // one player for all, and they start again together
    v.addEventListener("loadedmetadata", () => { if (player.active.has(v)) player.join(v); });
    watcher.observe(v);
  }
  player.set(player.playing);
  $("play").addEventListener("click", () => player.set(!player.playing));
  $("scrub").addEventListener("input", () => {
    player.position = $("scrub").value / 1000 * player.measure();
    player.set(false);
  });
  $("rate").addEventListener("change", () => {
    player.rate = Number($("rate").value);
    for (const v of player.active) v.playbackRate = player.rate;
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== " " || $("large").open || event.target.closest("button, input, select, summary, a, video")) return;
    event.preventDefault();
    player.set(!player.playing);
  });
  player.tick();
}

// ---- one video large; the arrows go to the other columns of the same prompt at the same moment
const large = { figures: [], index: 0, resume: false };
const show = (index, at) => {
  const { figures } = large, big = $("big"), figure = figures[index], video = figure.querySelector("video");
  const card = figure.closest(".card");
  large.index = index;
  big.classList.toggle("small", video.classList.contains("small"));
  big.width = video.width;
  big.height = video.height;
  big.src = video.dataset.src;
  big.playbackRate = player.rate;
  big.onloadedmetadata = () => { big.currentTime = Math.min(at, big.duration); big.play().catch(() => {}); };
  $("which").textContent = figure.dataset.column;
  $("large-prompt").textContent = card.querySelector(".prompt").textContent;
  const enhanced = [...card.querySelectorAll(".enhanced")].filter((p) => JSON.parse(p.dataset.columns).includes(figure.dataset.column));
  $("large-enhanced").textContent = enhanced.map((p) => p.textContent).join("\n");
  const facts = [...figure.querySelectorAll(".note, .scores li")].map((one) => one.textContent);
  $("large-note").textContent = facts.join(" · ");
  $("previous").disabled = index === 0;
  $("next").disabled = index === figures.length - 1;
};
const move = (by) => {
  const index = large.index + by;
  if (large.figures[index]) show(index, $("big").currentTime);
};
if ($("large")) {
  for (const video of videos) {
    const figure = video.closest("figure");
    const open = () => {
      large.figures = [...figure.parentElement.querySelectorAll("figure:not([hidden])")].filter((f) => f.querySelector("video"));
      large.resume = player.playing;
      player.set(false);
      show(large.figures.indexOf(figure), player.position);
      $("large").showModal();
    };
    const button = make("button", { type: "button", textContent: "⤢", ariaLabel: `Enlarge ${figure.dataset.column}` });
    figure.querySelector(".name").append(button);
    button.addEventListener("click", open);
    video.addEventListener("click", open);
  }
  $("previous").addEventListener("click", () => move(-1));
  $("next").addEventListener("click", () => move(1));
  $("close").addEventListener("click", () => $("large").close());
  $("large").addEventListener("keydown", (event) => {
    if (event.target === $("big")) return; // its own controls seek
    if (event.key === "ArrowLeft") move(-1);
    if (event.key === "ArrowRight") move(1);
  });
  $("large").addEventListener("close", () => {
    $("big").removeAttribute("src");
    $("big").load();
    if (large.resume) player.set(true);
  });
}

// ---- filters and order of a gallery
const collator = new Intl.Collator(undefined, { numeric: true });
const options = (select, entries, keep = select.value) => {
  select.replaceChildren(...entries.map(([value, text]) => make("option", { value, textContent: text })));
  if (entries.some(([value]) => value === keep)) select.value = keep;
};
const group = (...children) => make("div", { className: "group" }, ...children);
const picker = (label, entries = []) => {
  const select = make("select", { ariaLabel: label });
  options(select, entries);
  return select;
};
for (const gallery of document.querySelectorAll(".gallery")) {
  const columns = JSON.parse(gallery.dataset.columns), steps = JSON.parse(gallery.dataset.steps);
  const page = Number(gallery.dataset.page), grid = gallery.querySelector(".cards");
  const cards = [...grid.children].map((element, order) => ({
    element,
    order,
    prompt: element.querySelector(".prompt").textContent,
    text: [...element.querySelectorAll(".prompt, .enhanced, .note")].map((p) => p.textContent).join("\n").toLowerCase(),
    scores: JSON.parse(element.dataset.scores),
    step: Number(element.dataset.step),
  }));
  const names = [...new Set(cards.flatMap((c) => Object.values(c.scores).flatMap((s) => Object.keys(s))))];
  const scored = columns.filter((c) => cards.some((card) => card.scores[c]));
  const truth = (name) => cards.every((c) => Object.values(c.scores).every((s) => s[name] == null || typeof s[name] === "boolean"));
  // of many validations, six at first
  const few = Array.from({ length: 6 }, (_, i) => columns[Math.round(i * (columns.length - 1) / 5)]);
  const shown = new Set(steps.length || columns.length <= 8 ? columns : few);
  let limit = page, descending = true;

  const search = make("input", { type: "search", placeholder: "Filter by text", ariaLabel: "Filter by text" });
  const name = picker("Score", names.map((n) => [n, n]));
  const condition = picker("Condition"), where = picker("Column of the filter", scored.map((c) => [c, c]));
  const bound = make("input", { type: "number", step: "any", value: "0.5", ariaLabel: "Threshold" });
  const sort = picker("Sort by", [["given", "as given"], ["prompt", "prompt"], ...(names.length ? [["score", "score of"], ["difference", "difference"]] : [])]);
  const first = picker("Column of the order", scored.map((c) => [c, c]));
  const second = picker("Minus the column", scored.map((c) => [c, c]));
  const minus = make("span", { textContent: "minus" });
  const direction = make("button", { type: "button" });
  const count = make("p", { className: "count soft" });
  count.setAttribute("role", "status");
  const more = make("button", { type: "button", className: "more" });
  if (scored.length > 1) { first.value = scored.at(-1); where.value = scored.at(-1); }

  const value = (card, column) => card.scores[column]?.[name.value] ?? null;
  const number = (card) => {
    const [a, b] = [value(card, first.value), sort.value === "difference" ? value(card, second.value) : 0];
    return a === null || b === null ? null : Number(a) - Number(b);
  };
  const passes = (card) => {
    const v = value(card, where.value), wanted = condition.value;
    const others = columns.filter((c) => c !== where.value && shown.has(c)).map((c) => value(card, c)).filter((x) => x !== null);
    switch (wanted) {
      case "right": return v === true;
      case "wrong": return v === false;
      case "only-right": return v === true && !others.includes(true);
      case "only-wrong": return v === false && !others.includes(false);
      case "least": return v !== null && v >= Number(bound.value);
      case "below": return v !== null && v < Number(bound.value);
      default: return true;
    }
  };

  // steps: one, or two beside each other
  const slider = make("input", { type: "range", min: 0, max: Math.max(0, steps.length - 1), value: steps.length - 1, ariaLabel: "Training step" });
  const at = make("output");
  const beside = picker("Compare with step", [["", "alone"], ...steps.map((s) => [String(s), `beside step ${s}`])]);
  const ends = make("button", { type: "button", textContent: "First beside last" });
  const chosen = () => [steps[slider.value], ...(beside.value === "" ? [] : [Number(beside.value)])];

  const update = () => {
    const boolean = truth(name.value);
    options(condition, [["any", "any"], ...(boolean
      ? [["right", "right in"], ["wrong", "wrong in"], ["only-right", "right only in"], ["only-wrong", "wrong only in"]]
      : [["least", "at least"], ["below", "below"]])]);
    bound.hidden = !["least", "below"].includes(condition.value);
    where.hidden = condition.value === "any" || scored.length < 2;
    first.hidden = !["score", "difference"].includes(sort.value) || scored.length < 2;
    second.hidden = minus.hidden = sort.value !== "difference";
    direction.hidden = sort.value === "given";
    direction.textContent = descending ? "↓ descending" : "↑ ascending";
    if (steps.length) at.textContent = `step ${steps[slider.value]}`;

    const wanted = search.value.trim().toLowerCase(), stepsShown = chosen();
    const inStep = cards.filter((c) => !steps.length || stepsShown.includes(c.step));
    const found = inStep.filter((c) => c.text.includes(wanted) && passes(c));
    const shared = new Set(found.map((c) => c.prompt).filter((p) => new Set(found.filter((c) => c.prompt === p).map((c) => c.step)).size > 1));
    const sign = descending ? -1 : 1;
    found.sort((a, b) => {
      if (sort.value === "prompt") return sign * collator.compare(a.prompt, b.prompt) || a.order - b.order;
      if (sort.value === "given") {
        // beside each other: prompts that both steps have, then the others, the earlier step first
        if (stepsShown.length < 2) return a.order - b.order;
        const [x, y] = [shared.has(a.prompt), shared.has(b.prompt)];
        return y - x || (x ? collator.compare(a.prompt, b.prompt) : 0) || a.step - b.step || a.order - b.order;
      }
      const [x, y] = [number(a), number(b)];
      if (x === null || y === null) return (x === null) - (y === null) || a.order - b.order;
      return sign * (x - y) || a.order - b.order;
    });
    const visible = new Set(found.slice(0, limit));
    for (const card of cards) card.element.hidden = !visible.has(card);
    grid.append(...found.map((c) => c.element));
    count.textContent = `${visible.size} of ${found.length} prompts shown` + (found.length < inStep.length ? `, ${inStep.length - found.length} filtered out` : "");
    more.hidden = found.length <= limit;
    more.textContent = `Show ${Math.min(page, found.length - limit)} more`;
  };
  const again = () => { limit = page; update(); };
  const layout = () => {
    for (const figure of grid.querySelectorAll("figure")) figure.hidden = !shown.has(figure.dataset.column);
    grid.classList.toggle("wide", shown.size > 4);
    grid.classList.toggle("narrow", shown.size === 1);
    again();
  };

  const tools = make("div", { className: "tools" });
  if (steps.length > 1) {
    const line = group(make("span", { textContent: "Step" }), slider, at, beside, ends);
    line.classList.add("step");
    tools.append(line);
    ends.addEventListener("click", () => { slider.value = steps.length - 1; beside.value = String(steps[0]); again(); });
  }
  tools.append(group(search));
  if (names.length) tools.append(group(make("span", { textContent: "Score" }), name, condition, bound, where));
  tools.append(group(make("span", { textContent: "Sort by" }), sort, first, minus, second, direction));
  if (columns.length > 1) {
    const boxes = make("fieldset", { className: "group" }, make("legend", { textContent: "Columns" }));
    for (const column of columns) {
      const box = make("input", { type: "checkbox", checked: shown.has(column), value: column });
      box.addEventListener("change", () => { if (box.checked) shown.add(column); else shown.delete(column); layout(); });
      boxes.append(make("label", { className: "chip" }, box, column));
    }
    if (columns.length > 2) {
      const two = make("button", { type: "button", textContent: "First and last" });
      const toggle = () => {
        const only = boxes.querySelectorAll(":checked").length !== 2;
        for (const box of boxes.querySelectorAll("input")) {
          box.checked = !only || [columns[0], columns.at(-1)].includes(box.value);
          if (box.checked) shown.add(box.value); else shown.delete(box.value);
        }
        two.textContent = only ? "All columns" : "First and last";
        layout();
      };
      two.addEventListener("click", toggle);
      boxes.append(two);
    }
    tools.append(boxes);
  }
  grid.before(tools, count);
  grid.after(more);
  for (const input of [search, bound, slider]) input.addEventListener("input", again);
  for (const select of [name, condition, where, sort, first, second, beside]) select.addEventListener("change", again);
  direction.addEventListener("click", () => { descending = !descending; again(); });
  more.addEventListener("click", () => { limit += page; update(); });
  layout();
}
