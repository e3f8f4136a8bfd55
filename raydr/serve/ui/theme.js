/* Light or dark: the system's choice until the button is pressed, then the reader's, remembered on this device.
   Loaded before the page is drawn, so a remembered theme does not flash. */
(() => {
  const root = document.documentElement;
  const remembered = localStorage.getItem("theme");
  if (remembered === "light" || remembered === "dark") root.dataset.theme = remembered;

  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const current = root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
      root.dataset.theme = current === "dark" ? "light" : "dark";
      localStorage.setItem("theme", root.dataset.theme);
    });
  });
})();
