"""Charts as SVG, light and dark, for the scripts beside this file."""

from xml.sax.saxutils import escape

# Okabe and Ito's colors, which color-blind readers tell apart.
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]

STYLE = (
    "<style>text{fill:#222}.grid{stroke:#ddd}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.grid{stroke:#444}}</style>"
)

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 64, 190, 52, 52


def lines(title, x_label, y_label, ticks, series, level=None):
    """Returns an SVG.

    `ticks` are (value, label) on the x axis, `series` are (name, color index, is dashed, [(x, y)]), and `level` is a
    horizontal line as (name, y).
    """
    values = [y for *_, points in series for _, y in points] + ([level[1]] if level else [])
    first, last = ticks[0][0], ticks[-1][0]
    high = max(values) * 1.08

    def at_x(x):
        return LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def at_y(y):
        return HEIGHT - BOTTOM - y / high * (HEIGHT - TOP - BOTTOM)

    def text(x, y, words, **attributes):
        more = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in attributes.items())
        out.append(f'<text x="{x:.1f}" y="{y:.1f}"{more}>{escape(words)}</text>')

    def line(x1, y1, x2, y2, style):
        out.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>')

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        STYLE,
    ]
    text(LEFT, 22, title, font_size=15)
    text(16, TOP - 10, y_label)
    text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_label, text_anchor="middle")
    step = 10 ** (len(str(int(high))) - 1) / 2
    for n in range(int(high / step) + 1):
        line(LEFT, at_y(n * step), WIDTH - RIGHT, at_y(n * step), 'class="grid"')
        text(LEFT - 8, at_y(n * step) + 4, f"{n * step:g}", text_anchor="end")
    for value, label in ticks:
        text(at_x(value), HEIGHT - BOTTOM + 20, label, text_anchor="middle")
    legend = TOP + 40
    if level:
        name, y = level
        line(LEFT, at_y(y), WIDTH - RIGHT, at_y(y), f'stroke="{COLORS[3]}" stroke-width="2.5"')
        text(WIDTH - RIGHT + 8, TOP + 8, f"{name}: {y:.0f}", font_weight="bold")
        line(WIDTH - RIGHT + 8, TOP + 16, WIDTH - RIGHT + 36, TOP + 16, f'stroke="{COLORS[3]}" stroke-width="2.5"')
    for name, color, is_dashed, points in series:
        style = f'stroke="{COLORS[color]}" stroke-width="2"' + (' stroke-dasharray="5 4"' if is_dashed else "")
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
        out.append(f'<polyline fill="none" {style} points="{path}"/>')
        line(WIDTH - RIGHT + 8, legend, WIDTH - RIGHT + 36, legend, style)
        text(WIDTH - RIGHT + 42, legend + 4, name)
        legend += 20
    return "\n".join([*out, "</svg>", ""])


def bars(title, rows):
    """Returns an SVG of horizontal bars with a line at 1. `rows` are (name, value, words beside the bar)."""
    # Letters are at most so wide.
    left = 24 + 7.6 * max(len(name) for name, *_ in rows)
    right, step, top = 190, 26, 44
    height = top + step * len(rows) + 14
    high = max(value for _, value, _ in rows)
    scale = (WIDTH - left - right) / high
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
        STYLE,
        f'<text x="12" y="22" font-size="15">{escape(title)}</text>',
    ]
    for at, (name, value, words) in enumerate(rows):
        y = top + step * at
        out += [
            f'<text x="{left - 8:.1f}" y="{y + 13}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{left:.1f}" y="{y}" width="{value * scale:.1f}" height="{step - 8}" fill="{COLORS[0]}"/>',
            f'<text x="{left + value * scale + 8:.1f}" y="{y + 13}">{escape(words)}</text>',
        ]
    x = left + scale
    line = f'<line x1="{x:.1f}" y1="{top - 6}" x2="{x:.1f}" y2="{height - 12}" stroke="{COLORS[1]}" stroke-width="2"/>'
    return "\n".join([*out, line, "</svg>", ""])
