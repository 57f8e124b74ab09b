//! Chat templates are programs of strangers: whatever one does, the program ends well, soon, and
//! with one line that names the mend.

use crate::common::{check_refusal, demo_model, stdout, succeeded, tier_plan};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Starts a chat with a template of this source, and sends it a message.
fn start(folder: &Path, source: &str, mut command: Command) -> Child {
    fs::write(folder.join("chat.jinja"), source).unwrap();
    let mut child = command
        .current_dir(folder)
        .arg("run")
        .arg(demo_model())
        .args(["--chat", "--chat-template", "chat.jinja", "-n", "2"])
        .args(["--threads", "1", "--context", "256"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Fails if the template was refused before.
    let _ = child.stdin.as_mut().unwrap().write_all(b"Hello\n/stats\n");
    child
}

fn talk(source: &str) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let child = start(folder.path(), source, tier_plan());
    child.wait_with_output().unwrap()
}

/// The template must be refused for this reason, within the time that one may take.
fn refused(source: &str, reason: &str) {
    let began = Instant::now();
    let line = check_refusal(&talk(source), &[reason, "--chat-template FILE"]);
    assert!(line.len() < 500, "{line}");
    assert!(began.elapsed() < Duration::from_secs(40), "{line}");
}

#[test]
fn a_template_that_does_nothing_wrong_is_rendered() {
    let output = succeeded(talk("{% for m in messages %}{{ m.content }}{% endfor %}"));
    assert!(stdout(&output).contains("tokens processed"));
}

#[test]
fn a_template_that_cannot_be_read_is_refused() {
    refused("{%}", "line 1");
    refused("a\n{% for x %}", "line 2");
    refused("{{ 'x' | nothing_like_it }}", "nothing_like_it");
    refused("{{ raise_exception('a\x1b[2Jb' * 1000) }}", "a\\u001b[2Jb");
}

#[test]
fn a_template_without_end_is_stopped() {
    // One comparison of values that hold each other twice takes time beyond any count of steps.
    let doubling = "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}\
         {% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}";
    refused(doubling, "takes");
}

#[test]
fn a_template_without_bound_is_stopped() {
    let text = "{% set ns = namespace(x='0123456789abcdef') %}{% for i in range(40) %}\
         {% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}";
    refused(text, "memory");
    let holds_itself = "{% set ns = namespace() %}{% set ns.x = ns %}{% set b = namespace() %}\
         {% set b.x = b %}{{ ns == b }}";
    refused(holds_itself, "nests too deeply");
}

/// Limits of the shell bind the process that renders, too.
#[cfg(target_os = "linux")]
#[test]
fn a_template_is_rendered_within_the_limits_of_a_shell() {
    let folder = tempfile::tempdir().unwrap();
    let program = tier_plan();
    let mut shell = Command::new("sh");
    shell
        .args([
            "-c",
            "ulimit -v 1048576; ulimit -s 1024; exec \"$0\" \"$@\"",
        ])
        .arg(program.get_program());
    let source = "{% for m in messages %}{{ m.content }}{% endfor %}";
    let child = start(folder.path(), source, shell);
    succeeded(child.wait_with_output().unwrap());
}

/// One signal ends a template that runs, and leaves no process behind.
#[cfg(target_os = "linux")]
#[test]
fn one_signal_ends_a_template() {
    let slow = "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}\
         {% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}";
    for (signal, code) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let folder = tempfile::tempdir().unwrap();
        let mut child = start(folder.path(), slow, tier_plan());
        let renderer = wait_for_child(child.id());
        let began = Instant::now();
        let sent = Command::new("kill")
            .args([&format!("-{signal}"), &child.id().to_string()])
            .status();
        assert!(sent.unwrap().success());
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(code), "{signal}: {status}");
        assert!(began.elapsed() < Duration::from_secs(3), "{signal}");
        let left = Path::new("/proc").join(&renderer);
        assert!(!left.exists(), "{signal}: process {renderer} is left");
    }
}

/// Waits until a process renders a template that takes long, and returns the number of that process.
#[cfg(target_os = "linux")]
fn wait_for_child(parent: u32) -> String {
    let path = format!("/proc/{parent}/task/{parent}/children");
    let until = Instant::now() + Duration::from_secs(60);
    let (mut last, mut since) = (String::new(), Instant::now());
    loop {
        let child = fs::read_to_string(&path)
            .unwrap_or_default()
            .trim()
            .to_string();
        if child != last {
            (last, since) = (child, Instant::now());
        }
        // The check before the first message is over much sooner.
        if !last.is_empty() && since.elapsed() > Duration::from_secs(1) {
            return last;
        }
        assert!(Instant::now() < until, "nothing renders the template");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A control group of 64 MiB, where this user may make one.
#[cfg(target_os = "linux")]
struct SmallGroup(std::path::PathBuf);

#[cfg(target_os = "linux")]
impl SmallGroup {
    fn make() -> Option<Self> {
        let name = format!("tier-plan-test-{}", std::process::id());
        let kinds = [
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            ("/sys/fs/cgroup", "memory.max"),
        ];
        kinds.iter().find_map(|(root, limit)| {
            let group = Self(Path::new(root).join(&name));
            fs::create_dir(&group.0).ok()?;
            fs::write(group.0.join(limit), "67108864").ok()?;
            Some(group)
        })
    }
}

#[cfg(target_os = "linux")]
impl Drop for SmallGroup {
    fn drop(&mut self) {
        // Fails for a moment after the last process of the group.
        for _ in 0..50 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// In a container without memory it is the renderer that the system ends. Where no group can be
/// made, the shell's limit of address space takes its place.
#[cfg(target_os = "linux")]
#[test]
fn a_template_that_fills_a_small_container_ends_alone() {
    let folder = tempfile::tempdir().unwrap();
    let program = tier_plan();
    let group = SmallGroup::make();
    let limit = match &group {
        Some(group) => format!("echo $$ > {}/cgroup.procs", group.0.display()),
        None => "ulimit -v 1048576".to_string(),
    };
    let mut shell = Command::new("sh");
    shell
        .args(["-c", &format!("{limit} && exec \"$0\" \"$@\"")])
        .arg(program.get_program());
    let source = "{% set ns = namespace(x='0123456789abcdef') %}{% for i in range(40) %}\
         {% set ns.x = ns.x ~ ns.x %}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}";
    let child = start(folder.path(), source, shell);
    let output = child.wait_with_output().unwrap();
    check_refusal(&output, &["memory", "--chat-template FILE"]);
}
