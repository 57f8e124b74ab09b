// Colors of tiers: cool for fast ones, warm for slow ones, the same in bars, map, and lists.

const SHADES = {
  1: ["blue"],
  2: ["blue", "amber"],
  3: ["blue", "green", "amber"],
  4: ["violet", "blue", "green", "amber"],
};
const ALL = ["violet", "blue", "green", "amber", "rose"];

function shade(tier, tiers) {
  const shades = SHADES[tiers] ?? ALL;
  return shades[tier] ?? ALL[tier % ALL.length];
}

/** Returns the class that colors what belongs to a tier. */
export function tierClass(tier, tiers) {
  return `tier-${shade(tier, tiers)}`;
}

/** Returns a color of the style sheet, in the theme that is shown, as red, green, and blue. */
export function rgb(variable) {
  const probe = document.createElement("span");
  probe.style.color = `var(${variable})`;
  document.body.append(probe);
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color.match(/[\d.]+/g).slice(0, 3).map(Number);
}

/** Returns the color of a tier as red, green, and blue. */
export function tierRgb(tier, tiers) {
  return rgb(`--${shade(tier, tiers)}`);
}
