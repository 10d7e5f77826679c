"use strict";
// Every clip of a section shows the same frame of one clock, so that before and after can be compared.
for (const section of document.querySelectorAll("section[data-fps]")) {
  const fps = Number(section.dataset.fps), frames = Number(section.dataset.frames);
  const button = section.querySelector("button"), slider = section.querySelector("input[type=range]");
  const slow = section.querySelector("input[type=checkbox]"), output = section.querySelector("output");
  const clips = [];
  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches, position = 0, shown = 0, last = performance.now();

  const draw = ({ context, sheet, columns, width, height }) => {
    const x = (shown % columns) * width, y = Math.floor(shown / columns) * height;
    context.drawImage(sheet, x, y, width, height, 0, 0, width, height);
  };
  const show = frame => {
    shown = frame;
    slider.value = frame;
    output.textContent = `frame ${frame + 1}/${frames}`;
    clips.forEach(draw);
  };
  const tick = now => {
    if (playing) position = (position + (now - last) / 1000 * fps * (slow.checked ? 0.25 : 1)) % frames;
    last = now;
    if (Math.floor(position) !== shown) show(Math.floor(position));
    requestAnimationFrame(tick);
  };
  const setPlaying = value => { playing = value; button.textContent = value ? "Pause" : "Play"; };

  button.addEventListener("click", () => setPlaying(!playing));
  slider.addEventListener("input", () => { setPlaying(false); position = Number(slider.value); });
  for (const canvas of section.querySelectorAll("canvas")) {
    const { width, height } = canvas, image = canvas.nextElementSibling;
    // A bitmap stays decoded; an image may be decoded again for every frame that is drawn from it.
    image.decode().then(() => createImageBitmap(image)).then(sheet => {
      const clip = { context: canvas.getContext("2d"), sheet, columns: Number(canvas.dataset.columns), width, height };
      clips.push(clip);
      draw(clip);
    });
  }
  setPlaying(playing);
  show(0);
  requestAnimationFrame(tick);
}

// Return the index of the item whose step is nearest; the items are in order of their steps.
const nearest = (items, stepOf, wanted) => {
  let low = 0, high = items.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (stepOf(items[middle]) <= wanted) low = middle; else high = middle;
  }
  return wanted - stepOf(items[low]) <= stepOf(items[high]) - wanted ? low : high;
};

// A chart shows the values of the step that is pointed at, or chosen with the arrow keys. A series without a value at this step
// shows its nearest one.
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const data = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor"), at = figure.querySelector(".at");
  const values = [...figure.querySelectorAll(".legend b")], last = values.map(value => value.textContent), lastStep = at.textContent;
  const steps = [...new Set(data.series.flatMap(points => points.map(point => point[0])))].sort((a, b) => a - b);
  const end = steps.length - 1;
  let chosen = null;

  const format = value => {
    const shown = Number((data.percent ? 100 * value : value).toPrecision(4));
    return data.percent ? `${shown}\u00a0%` : String(shown);
  };
  const choose = index => {
    chosen = index;
    const step = steps[index], span = data.last - data.first;
    const x = span > 0 ? data.left + (step - data.first) / span * (data.right - data.left) : (data.left + data.right) / 2;
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.classList.add("on");
    at.classList.add("chosen");
    at.textContent = `step ${step}`;
    data.series.forEach((points, number) => {
      const [own, value] = points[nearest(points, point => point[0], step)];
      values[number].textContent = own === step ? format(value) : `${format(value)} (step ${own})`;
    });
    svg.setAttribute("aria-valuenow", step);
    svg.setAttribute("aria-valuetext", figure.querySelector(".readout").innerText);
  };
  const leave = () => {
    chosen = null;
    cursor.classList.remove("on");
    at.classList.remove("chosen");
    at.textContent = lastStep;
    values.forEach((value, number) => { value.textContent = last[number]; });
  };
  const point = event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const step = data.first + (x - data.left) / (data.right - data.left) * (data.last - data.first);
    choose(nearest(steps, each => each, step));
  };
  const moves = {
    ArrowLeft: () => Math.max(0, (chosen ?? end + 1) - 1), ArrowRight: () => Math.min(end, (chosen ?? end) + 1),
    Home: () => 0, End: () => end,
  };

  svg.setAttribute("tabindex", "0");
  svg.setAttribute("role", "slider");
  svg.setAttribute("aria-valuemin", data.first);
  svg.setAttribute("aria-valuemax", data.last);
  svg.setAttribute("aria-valuenow", data.last);
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") leave(); });
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", event => {
    if (event.key === "Escape") leave();
    else if (moves[event.key]) { event.preventDefault(); choose(moves[event.key]()); }
  });
}

for (const button of document.querySelectorAll("button.copy")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {  // pages that were opened in some ways may not write: the text is selected instead
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}
for (const text of document.querySelectorAll(".scripted")) text.hidden = false;
