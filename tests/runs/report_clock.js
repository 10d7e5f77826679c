// The test's clock in place of the browser's, for the frames of clips.
const clock = {
  now: 0, waiting: [],
  pass(milliseconds) {
    this.now += milliseconds;
    for (const tick of this.waiting.splice(0)) tick(this.now);
  },
};
performance.now = () => clock.now;
window.requestAnimationFrame = tick => clock.waiting.push(tick);
