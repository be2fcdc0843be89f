"use strict";
// the page of a run that goes on: what has changed is fetched, and nothing moves under the reader
(() => {
  const every = 2000, state = document.getElementById("state");
  let seen = null;
  const look = async () => {
    try {
      const stamp = await (await fetch("stamp", { cache: "no-store" })).text();
      if (seen !== null && stamp !== seen) {
        const text = await (await fetch("./", { cache: "no-store" })).text();
        const fresh = new DOMParser().parseFromString(text, "text/html");
        document.getElementById("run").replaceChildren(...fresh.getElementById("run").childNodes);
      }
      seen = stamp;
      state.textContent = "watching";
    } catch {
      state.textContent = "stabkit watch has ended; this is what it showed last";
    }
    setTimeout(look, every);
  };
  if (location.protocol.startsWith("http")) look();
})();
