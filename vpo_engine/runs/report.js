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
