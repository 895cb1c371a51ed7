//! Runs steps, counts what passed and prints the summary.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How to read counts from the output of a step.
#[derive(Clone, Copy)]
pub(crate) enum Tally {
    /// `Summary [..] 12 tests run: 11 passed, 1 failed` of cargo-nextest.
    Nextest,
    /// `test result: ok. 3 passed; 0 failed; ..`, once for each binary.
    Libtest,
    /// `50 seeds passed, 0 failed` of the simulator.
    Seeds,
}

/// What ran, and how it went.
pub(crate) struct Report {
    started: Instant,
    passed: u64,
    failed: u64,
    lines: Vec<String>,
    notes: Vec<String>,
}

impl Report {
    pub(crate) fn new() -> Self {
        Self { started: Instant::now(), passed: 0, failed: 0, lines: Vec::new(), notes: Vec::new() }
    }

    /// Runs a command that counts as one. True if it succeeded.
    pub(crate) fn run(&mut self, name: &str, mut command: Command) -> bool {
        banner(name);
        let began = Instant::now();
        let (ok, text) = match command.status() {
            Ok(status) => (status.success(), status.to_string()),
            Err(e) => (false, e.to_string()),
        };
        self.record(name, began.elapsed(), u64::from(ok), u64::from(!ok), if ok { "" } else { &text });
        ok
    }

    /// Runs commands that count as one each, as many at a time as there are cores. What a command printed is shown when it
    /// has ended.
    pub(crate) fn run_side_by_side(&mut self, mut commands: Vec<(String, Command)>) {
        let width = thread::available_parallelism().map_or(1, usize::from);
        for wave in commands.chunks_mut(width) {
            let ended: Vec<_> = thread::scope(|scope| {
                let runs: Vec<_> = wave
                    .iter_mut()
                    .map(|(name, command)| {
                        scope.spawn(move || {
                            let began = Instant::now();
                            (name, command.output(), began.elapsed())
                        })
                    })
                    .collect();
                runs.into_iter().map(|run| run.join().expect("a run does not panic")).collect()
            });
            for (name, output, took) in ended {
                banner(name);
                let (ok, text) = match output {
                    Ok(output) => {
                        print!("{}", String::from_utf8_lossy(&output.stdout));
                        eprint!("{}", String::from_utf8_lossy(&output.stderr));
                        (output.status.success(), output.status.to_string())
                    }
                    Err(e) => (false, e.to_string()),
                };
                self.record(name, took, u64::from(ok), u64::from(!ok), if ok { "" } else { &text });
            }
        }
    }

    /// Runs a check of our own that counts as one.
    pub(crate) fn check(&mut self, name: &str, check: impl FnOnce() -> Result<(), Vec<String>>) {
        banner(name);
        let began = Instant::now();
        match check() {
            Ok(()) => self.record(name, began.elapsed(), 1, 0, ""),
            Err(problems) => {
                for problem in &problems {
                    eprintln!("{problem}");
                }
                self.record(name, began.elapsed(), 0, 1, &format!("{} problems", problems.len()));
            }
        }
    }

    /// Runs a command that prints counts of its own. A failure without a failed count counts as one.
    pub(crate) fn count(&mut self, name: &str, command: Command, tally: Tally) {
        banner(name);
        let began = Instant::now();
        match tee(command, tally) {
            Ok((success, passed, failed)) => {
                let failed = if success { failed } else { failed.max(1) };
                self.record(name, began.elapsed(), passed, failed, "");
            }
            Err(e) => self.record(name, began.elapsed(), 0, 1, &e.to_string()),
        }
    }

    /// Records a failure that was met before its command could run.
    pub(crate) fn fail(&mut self, name: &str, why: &str) {
        eprintln!("{name}: {why}");
        self.record(name, Duration::ZERO, 0, 1, why.lines().next().unwrap_or_default());
    }

    /// Records what did not run, for the summary.
    pub(crate) fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    fn record(&mut self, name: &str, took: Duration, passed: u64, failed: u64, why: &str) {
        self.passed += passed;
        self.failed += failed;
        let state = if failed == 0 { "ok    " } else { "FAILED" };
        self.lines.push(
            format!("{state} {name:<28} {passed:>5} passed {failed:>4} failed {:>7.1} s  {why}", took.as_secs_f64())
                .trim_end()
                .to_owned(),
        );
    }

    /// Prints the summary; its last line is `N passed, N failed`.
    pub(crate) fn finish(self) -> ExitCode {
        println!("\n==== summary, {:.0} s", self.started.elapsed().as_secs_f64());
        for line in &self.lines {
            println!("{line}");
        }
        for note in &self.notes {
            println!("note   {note}");
        }
        println!("{} passed, {} failed", self.passed, self.failed);
        if self.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

fn banner(name: &str) {
    println!("\n==== {name}");
    // A closed stdout is met again, and reported, by the next println.
    let _ = std::io::stdout().flush();
}

/// Runs `command`, passes both its streams on and reads the counts from them.
fn tee(mut command: Command, tally: Tally) -> std::io::Result<(bool, u64, u64)> {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let stderr = child.stderr.take().expect("stderr was asked for as a pipe");
    let stdout = child.stdout.take().expect("stdout was asked for as a pipe");
    let other = thread::spawn(move || pass_on(stderr, std::io::stderr(), tally));
    let (p0, f0) = pass_on(stdout, std::io::stdout(), tally);
    let (p1, f1) = other.join().expect("the reader of a stream does not panic");
    let status = child.wait()?;
    Ok((status.success(), p0 + p1, f0 + f1))
}

fn pass_on(from: impl std::io::Read, mut to: impl Write, tally: Tally) -> (u64, u64) {
    let (mut passed, mut failed) = (0, 0);
    let mut reader = BufReader::new(from);
    let mut line = Vec::new();
    loop {
        line.clear();
        match reader.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return (passed, failed),
            Ok(_) => {
                // The summary still counts when nobody reads our output any more.
                let _ = to.write_all(&line);
                let (p, f) = counts(&String::from_utf8_lossy(&line), tally);
                passed += p;
                failed += f;
            }
        }
    }
}

/// The counts in one line of output, `(0, 0)` for a line without.
fn counts(line: &str, tally: Tally) -> (u64, u64) {
    let line = line.trim();
    let rest = match tally {
        Tally::Nextest if line.starts_with("Summary [") => line,
        Tally::Libtest if line.starts_with("test result:") => line,
        Tally::Seeds if line.contains(" seeds passed, ") => line,
        _ => return (0, 0),
    };
    let words: Vec<&str> =
        rest.split(|c: char| c.is_whitespace() || c == ',' || c == ';').filter(|w| !w.is_empty()).collect();
    let before =
        |name: &str| words.windows(2).filter(|w| w[1] == name).filter_map(|w| w[0].parse::<u64>().ok()).sum::<u64>();
    match tally {
        Tally::Seeds => (words.first().and_then(|w| w.parse().ok()).unwrap_or(0), before("failed")),
        _ => (before("passed"), before("failed") + before("timed") + before("exec")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_from_the_last_lines_of_each_runner() {
        let check = |line, tally, expect| assert_eq!(counts(line, tally), expect, "{line}");
        check(
            "     Summary [   0.4s] 12 tests run: 11 passed (1 slow), 1 failed, 2 skipped\n",
            Tally::Nextest,
            (11, 1),
        );
        check("test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out", Tally::Libtest, (3, 0));
        check("test result: FAILED. 3 passed; 2 failed; 0 ignored", Tally::Libtest, (3, 2));
        check("50 seeds passed, 0 failed, 12 s", Tally::Seeds, (50, 0));
        check("9 passed, 9 failed", Tally::Nextest, (0, 0));
    }
}
