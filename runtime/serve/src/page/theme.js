// The theme that was chosen, before anything is painted. A classic script: modules run too late.
"use strict";
(() => {
  try {
    const { theme } = JSON.parse(localStorage.getItem("tier-plan-settings") ?? "{}");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // The system's theme.
  }
})();
