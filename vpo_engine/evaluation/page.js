"use strict";
// All videos show the same frame of one clock. A video is decoded when it comes near the window, and let go of when it is far.
for (const section of document.querySelectorAll("section[data-fps]")) {
  const fps = Number(section.dataset.fps), frames = Number(section.dataset.frames);
  const play = section.querySelector(".play"), slider = section.querySelector("input[type=range]");
  const slow = section.querySelector(".slow"), output = section.querySelector("output");
  const by = section.querySelector(".by"), order = section.querySelector(".order");
  const box = section.querySelector(".cards"), cards = [...box.children];
  const near = new Map();
  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches, position = 0, shown = 0, last = performance.now();

  const draw = (canvas, sheet) => {
    const { width, height } = canvas, columns = Number(canvas.dataset.columns);
    const frame = Math.min(shown, Number(canvas.dataset.frames) - 1);
    const x = (frame % columns) * width, y = Math.floor(frame / columns) * height;
    canvas.getContext("2d").drawImage(sheet, x, y, width, height, 0, 0, width, height);
  };
  const show = frame => {
    shown = frame;
    slider.value = frame;
    output.textContent = `frame ${frame + 1}/${frames}`;
    for (const [canvas, sheet] of near) if (sheet) draw(canvas, sheet);
  };
  const tick = now => {
    if (playing) position = (position + (now - last) / 1000 * fps * (slow.checked ? 0.25 : 1)) % frames;
    last = now;
    if (Math.floor(position) !== shown) show(Math.floor(position));
    requestAnimationFrame(tick);
  };
  const setPlaying = value => { playing = value; play.textContent = value ? "Pause" : "Play"; };
  const open = async canvas => {
    if (near.has(canvas)) return;
    near.set(canvas, null);
    const image = new Image();
    image.src = canvas.nextElementSibling.dataset.src;
    await image.decode();
    const sheet = await createImageBitmap(image);
    if (!near.has(canvas)) { sheet.close(); return; }
    near.set(canvas, sheet);
    canvas.dataset.ready = "";
    draw(canvas, sheet);
  };
  const close = canvas => {
    near.get(canvas)?.close();
    near.delete(canvas);
  };

  play.addEventListener("click", () => setPlaying(!playing));
  slider.addEventListener("input", () => { setPlaying(false); position = Number(slider.value); show(position); });
  const watcher = new IntersectionObserver(entries => {
    for (const { target, isIntersecting } of entries) isIntersecting ? open(target) : close(target);
  }, { rootMargin: "600px" });
  for (const canvas of section.querySelectorAll("canvas")) watcher.observe(canvas);

  // The cards are sorted by the difference of the chosen measure, or by its value where there is one arm.
  const numbers = cards.map(card => JSON.parse(card.dataset.values));
  const key = (index, name) => {
    const values = numbers[index][name];
    if (!values || values.some(value => value === null)) return null;
    return values.length > 1 ? values[1] - values[0] : values[0];
  };
  const text = value => String(Number(value.toPrecision(4)));
  const sort = () => {
    const name = by.value, descending = order.getAttribute("aria-pressed") !== "true";
    order.hidden = name === "";
    order.textContent = descending ? "largest first" : "smallest first";
    const places = cards.map((card, index) => index);
    if (name) {
      places.sort((a, b) => {
        const one = key(a, name), other = key(b, name);
        if (one === null || other === null) return (one === null) - (other === null) || a - b;
        return (descending ? other - one : one - other) || a - b;
      });
    }
    for (const place of places) box.append(cards[place]);
    cards.forEach((card, index) => {
      const values = name ? numbers[index][name] ?? [] : [], change = name ? key(index, name) : null;
      const roles = [...card.querySelectorAll("b[data-role]")];
      for (const label of roles) {
        const value = values[values.length > 1 && label.dataset.role === "policy" ? 1 : 0];
        label.textContent = value === undefined || value === null ? "" : text(value);
      }
      card.dataset.key = change === null ? "" : String(change);
      card.querySelector(".chosen").textContent =
        change !== null && values.length > 1 ? `difference ${change > 0 ? "+" : ""}${text(change)}` : "";
    });
  };
  by.addEventListener("change", sort);
  order.addEventListener("click", () => {
    order.setAttribute("aria-pressed", String(order.getAttribute("aria-pressed") !== "true"));
    sort();
  });
  if (by.options.length > 1) by.selectedIndex = 1;
  sort();
  setPlaying(playing);
  show(0);
  requestAnimationFrame(tick);
}
