"use strict";
// Every clip of a section shows the same frame of one clock, so that before and after can be compared.
for (const section of document.querySelectorAll("section[data-fps]")) {
  const fps = Number(section.dataset.fps), frames = Number(section.dataset.frames);
  const button = section.querySelector("button"), slider = section.querySelector("input[type=range]");
  const slow = section.querySelector("input[type=checkbox]"), output = section.querySelector("output");
  const clips = [...section.querySelectorAll("canvas")].map(canvas => ({
    canvas, context: canvas.getContext("2d"), sheet: canvas.nextElementSibling, columns: Number(canvas.dataset.columns),
  }));
  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches, position = 0, shown = -1, last = performance.now();

  const draw = frame => {
    for (const { canvas, context, sheet, columns } of clips) {
      const { width, height } = canvas;
      const x = (frame % columns) * width, y = Math.floor(frame / columns) * height;
      context.drawImage(sheet, x, y, width, height, 0, 0, width, height);
    }
    slider.value = frame;
    output.textContent = `frame ${frame + 1}/${frames}`;
    shown = frame;
  };
  const tick = now => {
    if (playing) position = (position + (now - last) / 1000 * fps * (slow.checked ? 0.25 : 1)) % frames;
    last = now;
    if (Math.floor(position) !== shown) draw(Math.floor(position));
    requestAnimationFrame(tick);
  };
  const setPlaying = value => { playing = value; button.textContent = value ? "Pause" : "Play"; };

  button.addEventListener("click", () => setPlaying(!playing));
  slider.addEventListener("input", () => { setPlaying(false); position = Number(slider.value); });
  setPlaying(playing);
  Promise.all(clips.map(clip => clip.sheet.decode())).then(() => requestAnimationFrame(tick));
}
