//! A picture as a list of shapes, drawn by plotters into SVG or PNG.
//!
//! Charts lay themselves out into a [`Scene`] in pixels and never see a backend, so both files show
//! the same picture and a test can look for texts that overlap or leave the page. Bitmap text is
//! set here, glyph by glyph, because plotters' own rounds every glyph to whole pixels.

use super::ink::Ink;
use crate::printable::is_control;
use ab_glyph::{Font, FontRef, PxScale, ScaleFont, point};
use anyhow::{Context, Result, anyhow};
use plotters::prelude::{
    BitMapBackend, Color, DrawingBackend, IntoFont, RGBColor, SVGBackend, ShapeStyle,
};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, TextStyle};
use std::sync::LazyLock;

/// Device pixels per scene pixel in both backends: half-pixel positions in SVG, sharp bitmaps.
pub(super) const SCALE: f64 = 2.0;

/// How much wider than the bundled font a reader's sans-serif may be (DejaVu Sans is about that
/// much).
const WIDTH_SLACK: f64 = 1.12;

static REGULAR: LazyLock<Option<FontRef<'static>>> =
    LazyLock::new(|| FontRef::try_from_slice(include_bytes!("font/TierPlanSans-Regular.ttf")).ok());
static BOLD: LazyLock<Option<FontRef<'static>>> =
    LazyLock::new(|| FontRef::try_from_slice(include_bytes!("font/TierPlanSans-Bold.ttf")).ok());

fn font(bold: bool) -> Option<&'static FontRef<'static>> {
    if bold {
        BOLD.as_ref()
    } else {
        REGULAR.as_ref()
    }
}

fn px_scale(font: &FontRef<'_>, em: f64) -> PxScale {
    let units = f64::from(font.units_per_em().unwrap_or(1000.0)).max(1.0);
    PxScale::from((em * f64::from(font.height_unscaled()) / units) as f32)
}

/// Returns the width of a text at an em size, both in pixels, with a margin for wider fonts.
pub(super) fn text_width(text: &str, em: f64, bold: bool) -> f64 {
    let Some(font) = font(bold) else {
        return text.chars().count() as f64 * em * 0.6;
    };
    let scaled = font.as_scaled(px_scale(font, em));
    let width: f32 = text
        .chars()
        .map(|c| scaled.h_advance(scaled.glyph_id(c)))
        .sum();
    f64::from(width) * WIDTH_SLACK
}

/// Shortens a text to a width, with an ellipsis.
pub(super) fn fit(text: &str, em: f64, bold: bool, width: f64) -> String {
    if text_width(text, em, bold) <= width {
        return text.to_string();
    }
    let mut kept: Vec<char> = text.chars().collect();
    while kept.pop().is_some() {
        let short = format!("{}…", kept.iter().collect::<String>().trim_end());
        if text_width(&short, em, bold) <= width {
            return short;
        }
    }
    String::new()
}

/// Breaks a text at spaces into lines of at most `width` pixels.
pub(super) fn wrap(text: &str, em: f64, bold: bool, width: f64) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ').filter(|w| !w.is_empty()) {
        match lines.last_mut() {
            Some(line) if text_width(&format!("{line} {word}"), em, bold) <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(fit(word, em, bold, width)),
        }
    }
    lines
}

/// Replaces the characters that XML forbids, and those that would change how the text reads.
fn printable(text: String) -> String {
    text.replace(
        |c: char| is_control(c) || matches!(c, '\u{fffe}' | '\u{ffff}'),
        " ",
    )
}

/// Which point of a text its x coordinate names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// One line of text.
#[derive(Debug, Clone)]
pub(super) struct Text {
    pub x: f64,
    /// Baseline.
    pub y: f64,
    pub em: f64,
    pub bold: bool,
    pub anchor: Anchor,
    pub ink: Ink,
    pub text: String,
}

/// A shape.
#[derive(Debug, Clone)]
pub(super) enum Item {
    /// A filled rectangle: x, y, width, height.
    Rect(f64, f64, f64, f64, Ink),
    /// An open line through points, with a width.
    Path(Vec<(f64, f64)>, f64, Ink),
    /// A filled circle: center, radius.
    Dot(f64, f64, f64, Ink),
    Text(Text),
}

/// A picture as a list of shapes.
#[derive(Debug, Clone)]
pub(super) struct Scene {
    pub width: f64,
    /// Height in pixels; set last, when the layout is done.
    pub height: f64,
    pub items: Vec<Item>,
}

impl Scene {
    pub(super) fn new(width: f64) -> Self {
        Scene {
            width,
            height: 0.0,
            items: Vec::new(),
        }
    }

    pub(super) fn rect(&mut self, x: f64, y: f64, w: f64, h: f64, ink: Ink) {
        if w > 0.0 && h > 0.0 {
            self.items.push(Item::Rect(x, y, w, h, ink));
        }
    }

    pub(super) fn line(&mut self, x0: f64, y0: f64, x1: f64, y1: f64, width: f64, ink: Ink) {
        self.items
            .push(Item::Path(vec![(x0, y0), (x1, y1)], width, ink));
    }

    pub(super) fn path(&mut self, points: Vec<(f64, f64)>, width: f64, ink: Ink) {
        self.items.push(Item::Path(points, width, ink));
    }

    pub(super) fn dot(&mut self, x: f64, y: f64, r: f64, ink: Ink) {
        self.items.push(Item::Dot(x, y, r, ink));
    }

    pub(super) fn text(
        &mut self,
        x: f64,
        y: f64,
        em: f64,
        anchor: Anchor,
        ink: Ink,
        text: impl Into<String>,
    ) {
        let text = text.into();
        self.add(Text {
            x,
            y,
            em,
            bold: false,
            anchor,
            ink,
            text,
        });
    }

    /// Adds text on a patch of paper color, for places where grid lines pass.
    pub(super) fn text_on_paper(
        &mut self,
        x: f64,
        y: f64,
        em: f64,
        bold: bool,
        ink: Ink,
        text: impl Into<String>,
    ) {
        let text = text.into();
        let width = text_width(&text, em, bold) / WIDTH_SLACK;
        self.rect(x - 2.0, y - 0.8 * em, width + 4.0, 1.05 * em, Ink::Paper);
        self.add(Text {
            x,
            y,
            em,
            bold,
            anchor: Anchor::Start,
            ink,
            text,
        });
    }

    pub(super) fn bold(
        &mut self,
        x: f64,
        y: f64,
        em: f64,
        anchor: Anchor,
        ink: Ink,
        text: impl Into<String>,
    ) {
        let text = text.into();
        self.add(Text {
            x,
            y,
            em,
            bold: true,
            anchor,
            ink,
            text,
        });
    }

    /// Adds a text without what acts on the reader of a file.
    fn add(&mut self, text: Text) {
        self.items.push(Item::Text(Text {
            text: printable(text.text),
            ..text
        }));
    }

    fn device_size(&self) -> (u32, u32) {
        let px = |v: f64| (v.max(1.0) * SCALE).ceil().min(30_000.0) as u32;
        (px(self.width), px(self.height))
    }

    /// Returns the picture as an SVG document whose root element carries `label`.
    pub(super) fn svg(&self, label: &str) -> Result<String> {
        let size = self.device_size();
        let mut drawn = String::new();
        {
            let mut backend = SVGBackend::with_string(&mut drawn, size);
            draw(self, &mut backend, |backend, text, style, (x, y)| {
                // plotters sets a top-anchored line's baseline at 0.76 em and makes its em size /
                // 1.24.
                let em = text.em * SCALE;
                let at = (x as i32, (y - 0.76 * em).round() as i32);
                backend
                    .draw_text(&text.text, style, at)
                    .map_err(|e| anyhow!("drawing an SVG: {e}"))
            })?;
            backend
                .present()
                .map_err(|e| anyhow!("drawing an SVG: {e}"))?;
        }
        let body = drawn.find('>').map_or("", |end| &drawn[end + 1..]);
        Ok(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" viewBox=\"0 0 {} {}\" role=\"img\" \
             aria-label=\"{}\">{body}",
            self.width,
            self.height,
            size.0,
            size.1,
            super::html::escape(label),
        ))
    }

    /// Returns the picture as a PNG of [`SCALE`] times its size.
    pub(super) fn png(&self) -> Result<Vec<u8>> {
        let (width, height) = self.device_size();
        // Three bytes per pixel; the size is bounded.
        let mut pixels = vec![0; 3 * width as usize * height as usize];
        {
            let mut backend = BitMapBackend::with_buffer(&mut pixels, (width, height));
            draw(self, &mut backend, |backend, text, _, at| {
                set_glyphs(backend, text, at)
            })?;
            backend
                .present()
                .map_err(|e| anyhow!("drawing a PNG: {e}"))?;
        }
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_adaptive_filter(png::AdaptiveFilterType::Adaptive);
        let mut writer = encoder.write_header().context("encoding a PNG")?;
        writer
            .write_image_data(&pixels)
            .and_then(|()| writer.finish())
            .context("encoding a PNG")?;
        Ok(bytes)
    }
}

/// Draws every item; texts through `text`.
fn draw<B: DrawingBackend>(
    scene: &Scene,
    backend: &mut B,
    mut text: impl FnMut(&mut B, &Text, &TextStyle<'_>, (f64, f64)) -> Result<()>,
) -> Result<()> {
    let px = |v: f64| (v * SCALE).round();
    let at = |(x, y): (f64, f64)| (px(x) as i32, px(y) as i32);
    let fill = |ink: Ink| {
        let (r, g, b) = ink.rgb();
        ShapeStyle {
            color: RGBColor(r, g, b).to_rgba(),
            filled: true,
            stroke_width: 0,
        }
    };
    let paper = Item::Rect(0.0, 0.0, scene.width, scene.height, Ink::Paper);
    for item in std::iter::once(&paper).chain(&scene.items) {
        match item {
            Item::Rect(x, y, w, h, ink) => {
                let (x0, y0, x1, y1) = (
                    px(*x),
                    px(*y),
                    px(x + w).max(px(*x) + 1.0),
                    px(y + h).max(px(*y) + 1.0),
                );
                let end = (x1 as i32, y1 as i32);
                backend
                    .draw_rect((x0 as i32, y0 as i32), end, &fill(*ink), true)
                    .map_err(|e| anyhow!("drawing a chart: {e}"))?;
            }
            Item::Path(points, width, ink) => {
                let mut style = fill(*ink);
                style.stroke_width = (width * SCALE).round().max(1.0) as u32;
                let points: Vec<_> = points.iter().map(|p| at(*p)).collect();
                backend
                    .draw_path(points, &style)
                    .map_err(|e| anyhow!("drawing a chart: {e}"))?;
            }
            Item::Dot(x, y, r, ink) => {
                let r = (r * SCALE).round().max(1.0) as u32;
                backend
                    .draw_circle(at((*x, *y)), r, &fill(*ink), true)
                    .map_err(|e| anyhow!("drawing a chart: {e}"))?;
            }
            Item::Text(t) => {
                let (r, g, b) = t.ink.rgb();
                let style = if t.bold {
                    FontStyle::Bold
                } else {
                    FontStyle::Normal
                };
                let h_pos = match t.anchor {
                    Anchor::Start => HPos::Left,
                    Anchor::Middle => HPos::Center,
                    Anchor::End => HPos::Right,
                };
                let font = ("sans-serif", t.em * SCALE * 1.24, style).into_font();
                let color = RGBColor(r, g, b);
                let style = TextStyle::from(font)
                    .color(&color)
                    .pos(Pos::new(h_pos, VPos::Top));
                text(backend, t, &style, (px(t.x), px(t.y)))?;
            }
        }
    }
    Ok(())
}

/// Draws one line of text into a bitmap, at subpixel positions.
fn set_glyphs<B: DrawingBackend>(
    backend: &mut B,
    text: &Text,
    (x, baseline): (f64, f64),
) -> Result<()> {
    let Some(font) = font(text.bold) else {
        return Ok(());
    };
    let scale = px_scale(font, text.em * SCALE);
    let scaled = font.as_scaled(scale);
    let mut pen = 0f32;
    let mut last = None;
    let mut glyphs = Vec::with_capacity(text.text.len());
    for c in text.text.chars() {
        let id = scaled.glyph_id(c);
        if let Some(last) = last {
            pen += scaled.kern(last, id);
        }
        glyphs.push((id, pen));
        pen += scaled.h_advance(id);
        last = Some(id);
    }
    let start = x as f32
        - match text.anchor {
            Anchor::Start => 0.0,
            Anchor::Middle => pen / 2.0,
            Anchor::End => pen,
        };
    let (r, g, b) = text.ink.rgb();
    let mut first_error = None;
    let (width, height) = backend.get_size();
    for (id, offset) in glyphs {
        let glyph = id.with_scale_and_position(scale, point(start + offset, baseline as f32));
        let Some(outline) = font.outline_glyph(glyph) else {
            continue;
        };
        let bounds = outline.px_bounds();
        outline.draw(|gx, gy, cover| {
            let pixel = (
                bounds.min.x as i32 + gx as i32,
                bounds.min.y as i32 + gy as i32,
            );
            let inside =
                (0..width as i32).contains(&pixel.0) && (0..height as i32).contains(&pixel.1);
            if cover > 0.0 && inside && first_error.is_none() {
                let color = RGBColor(r, g, b).mix(f64::from(cover.min(1.0)));
                first_error = backend.draw_pixel(pixel, color.to_backend_color()).err();
            }
        });
    }
    first_error.map_or(Ok(()), |e| Err(anyhow!("drawing text: {e}")))
}

/// Checks that the bundled fonts can be read.
pub(super) fn check_fonts() -> Result<()> {
    REGULAR
        .as_ref()
        .and(BOLD.as_ref())
        .context("the bundled font cannot be read")
        .map(|_| ())
}

/// Returns the layout faults that a chart must not have: texts that leave the page or overlap, and
/// points outside it.
#[cfg(test)]
pub(super) fn faults(scene: &Scene) -> Vec<String> {
    let mut faults = Vec::new();
    let mut boxes: Vec<(f64, f64, f64, f64, &str)> = Vec::new();
    let inside = |x: f64, y: f64| {
        x >= -0.5 && y >= -0.5 && x <= scene.width + 0.5 && y <= scene.height + 0.5
    };
    for item in &scene.items {
        match item {
            Item::Text(t) => {
                let w = text_width(&t.text, t.em, t.bold);
                let x0 = match t.anchor {
                    Anchor::Start => t.x,
                    Anchor::Middle => t.x - w / 2.0,
                    Anchor::End => t.x - w,
                };
                let b = (
                    x0,
                    t.y - 0.74 * t.em,
                    x0 + w,
                    t.y + 0.22 * t.em,
                    t.text.as_str(),
                );
                if !inside(b.0, b.1) || !inside(b.2, b.3) {
                    faults.push(format!(
                        "cut off: {b:?} in {}×{}",
                        scene.width, scene.height
                    ));
                }
                for o in &boxes {
                    if b.0 < o.2 && o.0 < b.2 && b.1 < o.3 && o.1 < b.3 {
                        faults.push(format!("overlap: {b:?} and {o:?}"));
                    }
                }
                boxes.push(b);
            }
            Item::Rect(x, y, w, h, _) => {
                if !(inside(*x, *y) && inside(x + w, y + h)) {
                    faults.push(format!("outside: {item:?}"));
                }
            }
            Item::Path(points, ..) => {
                if !points.iter().all(|p| inside(p.0, p.1)) {
                    faults.push(format!("outside: {item:?}"));
                }
            }
            Item::Dot(x, y, ..) => {
                if !inside(*x, *y) {
                    faults.push(format!("outside: {item:?}"));
                }
            }
        }
    }
    faults
}
