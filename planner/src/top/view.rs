//! The view: a list of rows with ranks, of which the most needed that fit are drawn.

use super::cells::{bar, fit, most, pad, per_second, percent, span_of, sparkline, width_of};
use super::state::{Link, Point, Requests, Scene, Stage, State, Sums, Text, Tier};
use crate::print::digits;
use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Wrap};
use std::ffi::OsStr;
use tier_plan_runtime::units::show_bytes;

/// The least window, in columns and rows.
const MIN_WIDTH: u16 = 40;
const MIN_HEIGHT: u16 = 10;

/// Columns from which rows have more than the most needed.
const WIDE: usize = 60;

/// Least columns of a chart.
const MIN_CHART: usize = 6;

/// Ranks of rows: those of a lower one stay longer in a small window.
mod rank {
    pub const ALWAYS: u8 = 0;
    pub const RATES: u8 = 1;
    pub const ERRORS: u8 = 2;
    pub const TIERS: u8 = 3;
    pub const CACHE: u8 = 4;
    pub const TITLES: u8 = 5;
    pub const TEXTS: u8 = 6;
}

/// Whether there are colors. Only magenta and red are used, which show on black and on white; all
/// text has the terminal's own colors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Theme {
    has_color: bool,
}

impl Theme {
    /// Returns the theme that the variable `NO_COLOR` asks for.
    pub fn of(no_color: Option<&OsStr>) -> Self {
        Self {
            has_color: no_color.is_none_or(OsStr::is_empty),
        }
    }

    fn colored(self, color: Color) -> Style {
        match self.has_color {
            true => Style::new().fg(color),
            false => Style::new(),
        }
    }

    fn chart(self) -> Style {
        self.colored(Color::Magenta)
    }

    fn error(self) -> Style {
        self.colored(Color::Red).add_modifier(Modifier::BOLD)
    }
}

const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);

/// A row, and how needed it is.
struct Row {
    rank: u8,
    line: Line<'static>,
}

/// What rows are made with.
struct Page {
    width: usize,
    theme: Theme,
    rows: Vec<Row>,
}

/// Draws the view.
pub fn draw(frame: &mut Frame<'_>, state: &State, theme: Theme) {
    let area = frame.area();
    if area.width < MIN_WIDTH || area.height < MIN_HEIGHT {
        let text = format!(
            "Window too small: {} by {}, expected at least {MIN_WIDTH} by {MIN_HEIGHT}.",
            area.width, area.height
        );
        frame.render_widget(Paragraph::new(text).wrap(Wrap { trim: true }), area);
        return;
    }
    let mut page = Page {
        width: usize::from(area.width),
        theme,
        rows: Vec::new(),
    };
    if state.shows_help {
        page.help();
    } else {
        page.head(state);
        match &state.scene {
            Some(scene) => page.scene(state, scene),
            None => page.text(rank::ALWAYS, "No snapshot has come yet.".to_string()),
        }
    }
    let (rows, last) = (page.fitting(usize::from(area.height) - 1), footer(state));
    let top = Rect {
        height: area.height - 1,
        ..area
    };
    let bottom = Rect {
        y: area.y + area.height - 1,
        height: 1,
        ..area
    };
    frame.render_widget(Paragraph::new(rows), top);
    frame.render_widget(Paragraph::new(last), bottom);
}

fn footer(state: &State) -> Line<'static> {
    let key = |key: &'static str| Span::styled(key, BOLD);
    if state.shows_help {
        return Line::from(vec![key("?"), " back  ".into(), key("q"), " quit".into()]);
    }
    let pause = if state.is_paused {
        " go on  "
    } else {
        " pause  "
    };
    Line::from(vec![
        key("q"),
        " quit  ".into(),
        key("p"),
        pause.into(),
        key("?"),
        " help".into(),
    ])
}

impl Page {
    fn is_wide(&self) -> bool {
        self.width >= WIDE
    }

    fn push(&mut self, rank: u8, spans: Vec<Span<'static>>) {
        let line = Line::from(spans);
        self.rows.push(Row { rank, line });
    }

    fn text(&mut self, rank: u8, text: String) {
        self.push(rank, vec![text.into()]);
    }

    fn title(&mut self, name: &str) {
        let rule = "─".repeat(self.width.saturating_sub(name.len() + 1));
        let spans = vec![
            Span::styled(name.to_string(), BOLD),
            format!(" {rule}").into(),
        ];
        self.push(rank::TITLES, spans);
    }

    /// Returns the name of a row, as wide as all names.
    fn label(&self, name: &str) -> String {
        let width = if self.is_wide() { 10 } else { 8 };
        pad(&fit(name, width - 1), width)
    }

    /// Adds a row of a name, a value, and a chart in what is left of the width.
    fn charted(&mut self, name: &str, value: &str, values: &[Option<f64>], top: f64) {
        let width = if self.is_wide() { 28 } else { 17 };
        let head = format!("{}{}", self.label(name), pad(value, width));
        let left = self.width.saturating_sub(width_of(&head) + 1);
        let mut spans = vec![head.into()];
        if left >= MIN_CHART {
            let chart = format!(" {}", sparkline(values, top, left));
            spans.push(Span::styled(chart, self.theme.chart()));
        }
        self.push(rank::RATES, spans);
    }

    /// Returns the rows that fit: lower ranks first, each where it stands among the others.
    fn fitting(mut self, height: usize) -> Vec<Line<'static>> {
        let mut n_texts = 0;
        while self.rows.len() > height {
            let needed = self.rows.iter().map(|row| row.rank);
            let Some(least) = needed.max() else { break };
            if let Some(at) = self.rows.iter().rposition(|row| row.rank == least) {
                self.rows.remove(at);
                n_texts += usize::from(least == rank::TEXTS);
            }
        }
        let last = self.rows.iter_mut().rfind(|row| row.rank == rank::TEXTS);
        if let Some(last) = last.filter(|_| n_texts > 0) {
            last.line = Line::from(format!("and {} more", n_texts + 1));
        }
        self.rows.into_iter().map(|row| row.line).collect()
    }

    fn head(&mut self, state: &State) {
        let status = match &state.link {
            Link::Lost { .. } => "lost".to_string(),
            _ if state.is_paused => "paused".to_string(),
            Link::Connecting => "connecting".to_string(),
            Link::Live => match &state.scene {
                Some(scene) if self.is_wide() => format!("live, up {}", span_of(scene.uptime_s)),
                _ => "live".to_string(),
            },
        };
        let name = if self.is_wide() { "tier-plan top " } else { "" };
        let left = self.width.saturating_sub(name.len() + status.len() + 1);
        let spans = vec![
            Span::styled(name, BOLD),
            pad(&fit(&state.url, left), left + 1).into(),
            Span::styled(status, BOLD),
        ];
        self.push(rank::ALWAYS, spans);
        if let Link::Lost { why, retry_in } = &state.link {
            let next = format!("next try in {} s", retry_in.as_secs_f64().ceil());
            let left = self.width.saturating_sub(next.len() + 2);
            let text = format!("{}; {next}", fit(why, left));
            self.push(rank::ALWAYS, vec![Span::styled(text, self.theme.error())]);
        }
    }

    fn scene(&mut self, state: &State, scene: &Scene) {
        self.model(scene);
        let now = state.now();
        self.title("Speed");
        self.speed(state, scene, &now);
        self.title("Experts");
        self.experts(state, scene, &now);
        for (i, tier) in scene.tiers.iter().enumerate() {
            self.tier(tier, now.share(i));
        }
        self.title("Texts");
        self.queue(scene);
        for text in &scene.texts {
            self.one_text(text);
        }
    }

    fn model(&mut self, scene: &Scene) {
        let mut end = match &scene.plan {
            Some(plan) => format!(" · plan {}", fit(plan, self.width / 4)),
            None => String::new(),
        };
        if scene.is_emulated() {
            end += match self.width {
                80.. => " · emulated tiers: speeds are not a machine's",
                _ => " · emulated",
            };
        }
        let left = self.width.saturating_sub(width_of(&end));
        let model = fit(&scene.model, left);
        self.push(rank::ALWAYS, vec![Span::styled(model, BOLD), end.into()]);
    }

    fn speed(&mut self, state: &State, scene: &Scene, now: &Sums) {
        let history = |of: fn(&Point) -> f64| -> Vec<Option<f64>> {
            state.points.iter().map(|point| Some(of(point))).collect()
        };
        let decode = history(|point| point.decode_tok_s);
        let value = per_second(now, now.decode_tok_s());
        self.charted("decode", &value, &decode, most(&decode));
        let text = now.text_tok_s();
        let unit = if self.is_wide() { " tok/s" } else { "" };
        let measured = text.map_or("–".to_string(), |rate| digits(rate) + unit);
        let predicted = match (scene.predicted_tok_s, text) {
            (None, _) => "no prediction".to_string(),
            (Some(predicted), _) if !self.is_wide() => {
                format!("predicted {} tok/s", digits(predicted))
            }
            (Some(predicted), Some(rate)) => format!(
                "predicted {} ({})",
                digits(predicted),
                percent(rate / predicted)
            ),
            (Some(predicted), None) => format!("predicted {}", digits(predicted)),
        };
        let name = if self.is_wide() {
            " per text"
        } else {
            " a text"
        };
        let row = format!("{}{measured}, {predicted}", pad(name, self.label("").len()));
        self.text(rank::RATES, row);
        let prompt = history(|point| point.prompt_tok_s);
        let value = per_second(now, now.prompt_tok_s());
        self.charted("prompt", &value, &prompt, most(&prompt));
    }

    fn experts(&mut self, state: &State, scene: &Scene, now: &Sums) {
        let rate = |sums: &Sums| sums.hit_rate().map_or("–".to_string(), percent);
        let mut value = rate(now);
        if self.is_wide() {
            value += &format!(", {} so far", rate(&state.all));
        }
        let hits: Vec<_> = state.points.iter().map(|point| point.hit_rate).collect();
        self.charted("hits", &value, &hits, 1.0);
        let Some((last, tier)) = scene.tiers.iter().enumerate().next_back() else {
            return;
        };
        let measured = now.read_gbps(last);
        let value = match tier.read_gbps {
            _ if now.seconds <= 0.0 => "–".to_string(),
            Some(limit) if self.is_wide() => format!(
                "{} of {} GB/s ({})",
                digits(measured),
                digits(limit),
                percent(measured / limit)
            ),
            Some(limit) => format!("{} of {} GB/s", digits(measured), digits(limit)),
            None => format!("{} GB/s", digits(measured)),
        };
        let reads: Vec<_> = state.points.iter().map(|p| Some(p.read_gbps)).collect();
        let top = tier.read_gbps.unwrap_or(0.0).max(most(&reads));
        let name = if tier.name.is_empty() {
            "reads"
        } else {
            &tier.name
        };
        self.charted(name, &value, &reads, top);
    }

    fn tier(&mut self, tier: &Tier, share: Option<f64>) {
        let used = format!(
            "{} of {}",
            show_bytes(tier.used_bytes),
            show_bytes(tier.size_bytes)
        );
        let used = fit(&used, 22);
        let mut spans = vec![self.label(&tier.name).into()];
        if self.is_wide() {
            spans.push(pad(&used, 23).into());
            let part = tier.used_bytes as f64 / tier.size_bytes.max(1) as f64;
            spans.push(Span::styled(bar(part), self.theme.chart()));
        } else {
            spans.push(used.into());
        }
        if self.width >= 80 {
            let share = share.map_or("–".to_string(), percent);
            spans.push(format!(" {share:>6} of uses").into());
        }
        if tier.emulated {
            spans.push(" emulated".into());
        } else if self.width >= 80 && !tier.kind.eq_ignore_ascii_case(&tier.name) {
            spans.push(format!(" {}", fit(&tier.kind, 12)).into());
        }
        self.push(rank::TIERS, spans);
    }

    fn queue(&mut self, scene: &Scene) {
        let mut value = format!(
            "{} of {}, {} waiting",
            scene.running, scene.max_running, scene.waiting
        );
        if self.is_wide() {
            value = format!(
                "{} of {} at work, {} waiting of {} at most",
                scene.running, scene.max_running, scene.waiting, scene.max_waiting
            );
        }
        let row = format!("{}{value}", self.label("texts"));
        self.text(rank::RATES, row);
        let part = scene.pages_used() as f64 / scene.pages_total.max(1) as f64;
        let pages = format!("{} of {} pages", scene.pages_used(), scene.pages_total);
        let mut spans = vec![self.label("KV cache").into()];
        if self.is_wide() {
            spans.push(pad(&pages, 23).into());
            spans.push(Span::styled(bar(part), self.theme.chart()));
            spans.push(format!(" {:>6}", percent(part)).into());
        } else {
            spans.push(format!("{pages} ({})", percent(part)).into());
        }
        self.push(rank::CACHE, spans);
        if let Some(requests) = &scene.requests {
            self.requests(requests);
        }
    }

    fn requests(&mut self, requests: &Requests) {
        let Requests {
            answered,
            refused,
            queue_full,
            abandoned,
            failed,
        } = requests;
        let has_errors = *failed > 0 || *queue_full > 0;
        let text = match self.width {
            80.. => format!(
                "{failed} failed, {queue_full} queue full, {refused} refused, {abandoned} left, {answered} answered"
            ),
            WIDE.. => format!("{failed} failed, {queue_full} queue full, {refused} refused"),
            _ => format!("{failed} failed, {queue_full} full"),
        };
        let style = match has_errors {
            true => self.theme.error(),
            false => Style::new(),
        };
        let row = format!(
            "{}{text}",
            self.label(if self.is_wide() { "requests" } else { "errors" })
        );
        let rank = match has_errors {
            true => rank::ERRORS,
            false => rank::CACHE,
        };
        self.push(rank, vec![Span::styled(row, style)]);
    }

    fn one_text(&mut self, text: &Text) {
        let name = pad(&format!("#{} {}", text.id, text.stage.name()), 18);
        let mut spans = vec![name.into()];
        let is_begun = matches!(text.stage, Stage::Prompt | Stage::Generating);
        if is_begun && self.is_wide() {
            let part = text.n_done as f64 / text.n_prompt.max(1) as f64;
            spans.push(Span::styled(bar(part), self.theme.chart()));
            spans.push(" ".into());
        }
        let done = match text.stage {
            Stage::Prompt => format!("{} of {} tokens", text.n_done, text.n_prompt),
            Stage::Generating => format!("{} tokens after {}", text.n_decoded, text.n_prompt),
            _ => format!("prompt of {} tokens", text.n_prompt),
        };
        spans.push(done.into());
        self.push(rank::TEXTS, spans);
    }

    fn help(&mut self) {
        for text in [
            "q        end          p  pause",
            "Ctrl-L   draw anew    ?  this help",
            "decode   tokens of all texts per second",
            "a text   of one, beside the prediction",
            "hits     experts found in memory",
            "GB/s     read of what the tier has",
            "Charts go back, one second per column.",
        ] {
            self.text(rank::ALWAYS, text.to_string());
        }
    }
}
