// Numbers as people read them. A number and its unit stay in one line.

const WHOLE = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const JOIN = "\u00a0";
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

/** Whether a value is a finite number. */
export function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

/** Returns a whole number with separators. */
export function count(n) {
  return isNumber(n) ? WHOLE.format(n) : "–";
}

/** Returns a number with three digits or so. */
export function short(n) {
  if (!isNumber(n)) return "–";
  const size = Math.abs(n);
  if (size >= 100 || n === 0) return WHOLE.format(n);
  return n.toFixed(size >= 10 ? 1 : 2);
}

/** Returns bytes in the unit that leaves few digits. */
export function bytes(n) {
  if (!isNumber(n)) return "–";
  let unit = 0;
  while (n >= 1000 && unit + 1 < UNITS.length) {
    n /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? WHOLE.format(n) : short(n)}${JOIN}${UNITS[unit]}`;
}

/** Returns a share as a percentage. */
export function percent(share) {
  if (!isNumber(share)) return "–";
  const value = share * 100;
  const digits = value > 0 && value < 10 ? 1 : 0;
  // 99.96 % is not everything.
  const shown = value < 100 && value > 99 ? Math.floor(value * 10) / 10 : value.toFixed(digits);
  return `${shown}${JOIN}%`;
}

/** Returns seconds or minutes. */
export function seconds(s) {
  if (!isNumber(s)) return "–";
  if (s < 0.001) return `0${JOIN}s`;
  if (s < 1) return `${WHOLE.format(s * 1000)}${JOIN}ms`;
  return s < 90 ? `${short(s)}${JOIN}s` : `${Math.floor(s / 60)}${JOIN}min ${WHOLE.format(Math.floor(s % 60))}${JOIN}s`;
}

/** Returns a noun with its number. */
export function many(n, noun, plural = `${noun}s`) {
  return `${count(n)}${JOIN}${n === 1 ? noun : plural}`;
}
