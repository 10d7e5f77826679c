// Uses the page of a run as a person does, and leaves what it saw in the attribute data-found of the body. The test puts it
// behind the page's own script, and ``report_clock.js`` before it.
(async () => {
  const found = {};
  const text = (root, query) => root.querySelector(query).textContent;
  const later = () => new Promise(done => setTimeout(done, 0));

  // Clips: the frame that the output names is drawn in all of them.
  await Promise.all([...document.querySelectorAll("canvas + img")].map(image => image.decode()));
  for (let wait = 0; wait < 20; wait++) await later();
  const section = document.querySelector("section[data-fps]"), slider = section.querySelector("input[type=range]");
  const button = section.querySelector("button"), slow = section.querySelector("input[type=checkbox]");
  const same = canvas => {
    const { width, height } = canvas, own = document.createElement("canvas"), frame = Number(slider.value);
    own.width = width; own.height = height;
    const columns = Number(canvas.dataset.columns), context = own.getContext("2d");
    context.drawImage(canvas.nextElementSibling, frame % columns * width, Math.floor(frame / columns) * height,
                      width, height, 0, 0, width, height);
    const [expected, shown] = [context, canvas.getContext("2d")].map(each => each.getImageData(0, 0, width, height).data);
    return shown.every((value, place) => value === expected[place]);
  };
  const look = () => ({
    output: text(section, "output"), button: button.textContent, slider: Number(slider.value),
    right: [...section.querySelectorAll("canvas")].map(same).every(Boolean),
  });
  found.canvases = section.querySelectorAll("canvas").length;
  found.start = look();
  clock.pass(1000);
  found.second = look();
  slow.checked = true;
  clock.pass(1000);
  found.slow = look();
  slow.checked = false;
  button.click();
  clock.pass(1000);
  found.paused = look();
  slider.value = 16;
  slider.dispatchEvent(new Event("input"));
  clock.pass(10);
  found.chosen = look();
  button.click();
  clock.pass(250);
  found.around = look();

  // A chart, by the keyboard and by the mouse.
  const figure = [...document.querySelectorAll("figure[data-chart]")].find(each => each.querySelectorAll(".legend b").length > 1);
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor");
  const readout = () => ({
    at: text(figure, ".at"), values: [...figure.querySelectorAll(".legend b")].map(each => each.textContent),
    now: svg.getAttribute("aria-valuenow"), on: cursor.classList.contains("on"), x: Number(cursor.getAttribute("x1")),
  });
  const press = key => { svg.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true })); return readout(); };
  const move = step => {
    const data = JSON.parse(figure.dataset.chart), box = svg.getBoundingClientRect();
    const x = data.left + (step - data.first) / (data.last - data.first) * (data.right - data.left);
    const clientX = box.left + x / svg.viewBox.baseVal.width * box.width;
    svg.dispatchEvent(new PointerEvent("pointermove", { clientX, pointerType: "mouse" }));
    return readout();
  };
  found.data = JSON.parse(figure.dataset.chart);
  found.chart = { before: readout(), home: press("Home"), right: press("ArrowRight"), end: press("End") };
  found.chart.beyond = press("ArrowRight");
  found.chart.left = press("ArrowLeft");
  found.chart.escaped = press("Escape");
  found.chart.pointed = move(31);
  found.chart.between = move(11.6);
  svg.dispatchEvent(new PointerEvent("pointerleave", { pointerType: "mouse" }));
  found.chart.away = readout();

  // The button that copies a command, where the browser lets it and where it does not.
  const copy = document.querySelector("button.copy"), code = text(copy.parentElement, "code");
  let copied = null;
  const give = writeText => Object.defineProperty(navigator, "clipboard", { value: { writeText }, configurable: true });
  found.copy = { hidden: copy.hidden, code };
  give(async words => { copied = words; });
  copy.click();
  await later();
  found.copy.copied = [copy.textContent, copied];
  give(async () => { throw new Error("not allowed"); });
  copy.click();
  await later();
  found.copy.selected = [copy.textContent, getSelection().toString()];
  found.scripted = [...document.querySelectorAll(".scripted")].map(each => each.hidden);
  document.body.dataset.found = JSON.stringify(found);
})().catch(error => { document.body.dataset.found = JSON.stringify({ error: String(error.stack) }); });
