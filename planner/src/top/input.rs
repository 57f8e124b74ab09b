//! What keys do.

use ratatui::crossterm::event::{Event, KeyCode, KeyEventKind, KeyModifiers};

/// What an event asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The end.
    Quit,
    /// The end as by SIGINT, which a terminal that sends keys one by one does not make of Ctrl-C.
    Interrupt,
    /// To leave snapshots out, or to show them again.
    Pause,
    /// Help, or the view again.
    Help,
    /// The view again, if help is shown.
    Back,
    /// To draw everything anew.
    Redraw,
    /// Nothing.
    None,
}

/// Returns what an event asks for.
pub fn action(event: &Event) -> Action {
    let key = match event {
        Event::Key(key) if key.kind != KeyEventKind::Release => key,
        Event::Resize(..) => return Action::Redraw,
        _ => return Action::None,
    };
    let with_control = key.modifiers.contains(KeyModifiers::CONTROL);
    match key.code {
        KeyCode::Char('c') if with_control => Action::Interrupt,
        KeyCode::Char('l') if with_control => Action::Redraw,
        _ if with_control => Action::None,
        KeyCode::Char('q' | 'Q') => Action::Quit,
        KeyCode::Char('p' | 'P' | ' ') => Action::Pause,
        KeyCode::Char('?' | 'h') => Action::Help,
        KeyCode::Esc => Action::Back,
        _ => Action::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::crossterm::event::KeyEvent;

    fn of(code: KeyCode, modifiers: KeyModifiers) -> Action {
        action(&Event::Key(KeyEvent::new(code, modifiers)))
    }

    #[test]
    fn keys_mean_what_help_says() {
        let plain = KeyModifiers::NONE;
        let control = KeyModifiers::CONTROL;
        for (c, modifiers, expected) in [
            ('q', plain, Action::Quit),
            ('p', plain, Action::Pause),
            (' ', plain, Action::Pause),
            ('?', KeyModifiers::SHIFT, Action::Help),
            ('c', control, Action::Interrupt),
            ('l', control, Action::Redraw),
            ('c', plain, Action::None),
            ('q', control, Action::None),
        ] {
            assert_eq!(of(KeyCode::Char(c), modifiers), expected, "{c}");
        }
        assert_eq!(of(KeyCode::Esc, plain), Action::Back);
        assert_eq!(action(&Event::Resize(1, 1)), Action::Redraw);
        let mut released = KeyEvent::new(KeyCode::Char('q'), plain);
        released.kind = KeyEventKind::Release;
        assert_eq!(action(&Event::Key(released)), Action::None);
    }
}
