// Videos are decoded only while they are near the viewport: a browser allows a page about 75 players.
const button = document.getElementById("play");
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
const start = (video) => {
  if (!video.src) video.src = video.dataset.src;
  // play() is rejected when the video scrolls away before it starts, which is no error here
  if (playing) video.play().catch(() => {});
};
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) start(target);
    else if (target.src) { target.pause(); target.removeAttribute("src"); target.load(); }
  }
}, { rootMargin: "150px" });
const videos = [...document.querySelectorAll("video[data-src]")];
videos.forEach((video) => watcher.observe(video));
const label = () => { button.textContent = playing ? "Pause all videos" : "Play all videos"; };
if (button) {
  label();
  button.hidden = false;
  button.addEventListener("click", () => {
    playing = !playing;
    label();
    for (const video of videos) if (video.src) { if (playing) start(video); else video.pause(); }
  });
}
