// Before the first paint: no flash of the other theme, and no layout of rows that are put away.
document.documentElement.classList.add("js");
try {
  const theme = localStorage.getItem("spectral-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage may be forbidden: the theme of the system stays.
}
