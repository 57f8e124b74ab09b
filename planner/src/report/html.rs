//! The page: one self-contained file, for light and dark screens and for paper. It is whole without
//! its script, which only sorts tables.
//!
//! Reports are sent to others and opened from a disk. The page's own policy forbids all loading, and
//! any script and style but its own, whatever a name in a record may hold.

mod sources;
mod table;

use super::chart::Chart;
use super::ink::dark_css;
use super::view::Overview;
use super::{Group, Report};
use crate::printable::is_control;
use ring::digest::{SHA256, digest};
use std::fmt::Write as _;
use tier_plan_runtime::units::show_bytes;
use tier_plan_serve::PAGE_TOKENS;

const CSS: &str = include_str!("html/page.css");
const SCRIPT: &str = include_str!("html/sort.js");

/// Most bytes of a page that is one file to be sent.
pub(super) const MAX_SHARED_BYTES: usize = 4 << 20;

/// Bytes kept for the end of a page that leaves something out.
const END_BYTES: usize = 2048;

/// Escapes text for HTML, XML, and quoted attributes. Characters that XML forbids become `�`.
pub(super) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            '\t' | '\n' | '\r' => safe.push(' '),
            c if is_control(c) || matches!(c, '\u{fffe}' | '\u{ffff}') => safe.push('\u{fffd}'),
            c => safe.push(c),
        }
    }
    safe
}

/// Returns a chart as a file of its own, with the style sheet for dark pages.
pub(super) fn standalone_svg(svg: &str) -> String {
    match svg.find('>') {
        Some(end) => format!(
            "{}<style>{}</style>{}",
            &svg[..=end],
            dark_css(),
            &svg[end + 1..]
        ),
        None => svg.to_string(),
    }
}

/// Encodes bytes in base64.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let byte = |i: usize| u32::from(group.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for digit in 0..4 {
            let value = (bits >> (18 - 6 * digit)) & 63;
            let is_there = digit <= group.len();
            text.push(if is_there {
                DIGITS[value as usize] as char
            } else {
                '='
            });
        }
    }
    text
}

/// Returns what the page may do: apply its own style sheet, run its own script, load nothing.
fn policy(style: &str) -> String {
    let hash = |text: &str| base64(digest(&SHA256, text.as_bytes()).as_ref());
    format!(
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; base-uri 'none'; form-action 'none'",
        hash(style),
        hash(SCRIPT)
    )
}

/// What the page has of one model on one machine.
pub(super) struct Section<'a> {
    pub group: &'a Group,
    pub overview: &'a Overview<'a>,
    pub charts: &'a [Chart],
    /// The charts' SVG documents, in the order of `charts`.
    pub drawn: &'a [String],
    /// Beginning of the names of its files.
    pub prefix: String,
}

/// What a page is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The index of a folder that has charts and numbers as files, too.
    Folder,
    /// A file alone, of at most [`MAX_SHARED_BYTES`].
    Shared,
}

/// A page that is being written, up to a number of bytes.
struct Page {
    html: String,
    kind: Kind,
    most_bytes: usize,
    /// Rows and other parts that had no room.
    left_out: usize,
}

impl Page {
    /// Whether so many bytes more have room.
    fn has_room(&self, bytes: usize) -> bool {
        self.html.len().saturating_add(bytes) <= self.most_bytes
    }

    /// Appends a part if it has room; counts it otherwise.
    fn put(&mut self, part: &str) {
        if self.has_room(part.len()) {
            self.html.push_str(part);
        } else {
            self.left_out += 1;
        }
    }
}

/// Writes the page. `rest` is what concerns all groups, where there are several.
pub(super) fn page(
    report: &Report,
    sections: &[Section<'_>],
    rest: Option<&Section<'_>>,
    kind: Kind,
) -> String {
    let title = if report.title.is_empty() {
        "Plans side by side"
    } else {
        &report.title
    };
    let title = escape(title);
    let style = format!("{PAGE_TOKENS}{CSS}{}", dark_css());
    let mut page = Page {
        html: String::with_capacity(256 * 1024),
        kind,
        most_bytes: match kind {
            Kind::Folder => usize::MAX,
            Kind::Shared => MAX_SHARED_BYTES - END_BYTES,
        },
        left_out: 0,
    };
    let _ = write!(
        page.html,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"{}\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n\
         <style>{style}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n",
        policy(&style)
    );
    page.put(&format!(
        "<p class=\"when\">{}</p>\n",
        escape(&when(report))
    ));
    if let [one] = sections {
        headline(&mut page, one.overview);
        table::plans(&mut page, one.overview, "h2");
        page.put("<h2>Charts</h2>\n");
        figures(&mut page, one);
        sources::write(&mut page, one.overview, "h2");
    } else {
        table::groups(&mut page, sections);
        for (at, section) in sections.iter().enumerate() {
            let heading = escape(&section.group.heading());
            page.put(&format!("<h2 id=\"g{}\">{heading}</h2>\n", at + 1));
            headline(&mut page, section.overview);
            table::plans(&mut page, section.overview, "h3");
            figures(&mut page, section);
            sources::write(&mut page, section.overview, "h3");
        }
    }
    if let Some(rest) = rest.filter(|rest| !rest.charts.is_empty()) {
        page.put("<h2>All models and machines</h2>\n");
        figures(&mut page, rest);
    }
    notes(&mut page, report);
    end(page)
}

/// Appends the closing tags, and what was left out.
fn end(page: Page) -> String {
    let mut html = page.html;
    if page.left_out > 0 {
        let _ = writeln!(
            html,
            "<p>{} rows, charts, or other parts are left out: this page has at most {}.</p>",
            page.left_out,
            show_bytes(MAX_SHARED_BYTES as u64)
        );
    }
    let _ = write!(
        html,
        "</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    );
    html
}

fn headline(page: &mut Page, o: &Overview<'_>) {
    let mut html = String::from("<section class=\"headline\">\n");
    for sentence in o.headline() {
        let _ = writeln!(html, "<p>{}</p>", escape(&sentence));
    }
    html.push_str("</section>\n");
    page.put(&html);
}

fn figures(page: &mut Page, section: &Section<'_>) {
    for (chart, svg) in section.charts.iter().zip(section.drawn) {
        let file = format!("{}{}", section.prefix, chart.file);
        let files = match page.kind {
            Kind::Shared => String::new(),
            Kind::Folder => format!(
                " <span class=\"small\">Files: <a href=\"{file}.svg\">SVG</a>, <a href=\"{file}.png\">PNG</a>, \
                 <a href=\"{file}.csv\">numbers</a>.</span>"
            ),
        };
        let label = escape(&chart.title);
        page.put(&format!(
            "<figure id=\"{file}\">\n<div class=\"scroll\" role=\"group\" aria-label=\"{label}\" tabindex=\"0\">{svg}</div>\
             <figcaption>{}{files}</figcaption>\n</figure>\n",
            escape(&chart.how)
        ));
    }
    if section.charts.is_empty() {
        page.put("<p>There was nothing to draw.</p>\n");
    }
}

fn when(report: &Report) -> String {
    let parts: Vec<&str> = [report.generated.as_str(), report.host.as_str()]
        .into_iter()
        .filter(|s| !s.is_empty())
        .collect();
    parts.join(" · ")
}

fn notes(page: &mut Page, report: &Report) {
    if report.notes.is_empty() {
        return;
    }
    let mut html = String::from("<h2>Notes</h2>\n<ul>\n");
    for note in &report.notes {
        let _ = writeln!(html, "<li>{}</li>", escape(note));
    }
    html.push_str("</ul>\n");
    page.put(&html);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_standard() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }

    #[test]
    fn the_policy_lets_nothing_in() {
        let policy = policy("p { }");
        assert!(policy.starts_with("default-src 'none';"), "{policy}");
        for loose in ["unsafe", "http", "data:", "*", "self"] {
            assert!(!policy.contains(loose), "{loose} in {policy}");
        }
    }

    /// The script takes no markup from text, and asks for nothing.
    #[test]
    fn the_script_makes_no_markup() {
        for sink in [
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "fetch",
            "XMLHttp",
            "eval",
            "</",
        ] {
            assert!(!SCRIPT.contains(sink), "{sink}");
        }
        assert!(!CSS.contains("url(") && !CSS.contains("@import") && !CSS.contains("</"));
    }
}
