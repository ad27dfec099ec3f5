//! How far a long job is: a bar on a terminal, a line every few seconds elsewhere.

use std::collections::VecDeque;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Speeds are those of the last so many seconds.
const WINDOW: Duration = Duration::from_secs(20);
/// Plain lines come at most so often.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// The shown loss forgets half in so many steps.
const LOSS_HALF_LIFE: f64 = 25.0;
/// Readings of the clock kept for the speed.
const READINGS: usize = 256;

/// What is known of a job before it begins.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// The word before the bar, such as `train`.
    pub name: String,
    /// Steps done before, by an interrupted run.
    pub first_step: u64,
    /// The step after which the job is finished.
    pub total_steps: u64,
    /// Images that one step handles; 0 where steps differ in it, and then steps are what is counted.
    pub images_per_step: f64,
    /// Floating-point operations of one step, a multiply-add counting 2, as counted from the graph; 0 if unknown.
    pub flops_per_step: f64,
}

/// Mean speed of a whole job.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Wall-clock seconds from the start to the last step.
    pub seconds: f64,
    /// Steps done in them.
    pub steps: u64,
    /// Images a second.
    pub images_per_s: f64,
    /// 10⁹ floating-point operations a second; 0 if their number is unknown.
    pub gflops_per_s: f64,
}

/// A running job on stderr.
pub struct Progress {
    job: Job,
    show: Show,
    started: Instant,
    step: u64,
    readings: VecDeque<(Instant, u64)>,
    loss: Mean,
}

enum Show {
    Bar(ProgressBar),
    Lines { to: Box<dyn Write + Send>, last: Option<Instant> },
}

impl Progress {
    /// Begins to show `job` on stderr: a bar if that is a terminal, else plain lines.
    pub fn new(job: Job) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self::lines(job, Box::new(std::io::stderr()), Instant::now());
        }
        let bar = ProgressBar::with_draw_target(Some(job.total_steps), ProgressDrawTarget::stderr_with_hz(8));
        let style = ProgressStyle::with_template("{prefix:.bold} {bar:28.cyan/dim} {pos}/{len}  {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━━─"));
        bar.set_prefix(job.name.clone());
        bar.set_position(job.first_step);
        Self::begin(job, Show::Bar(bar), Instant::now())
    }

    fn lines(job: Job, to: Box<dyn Write + Send>, now: Instant) -> Self {
        Self::begin(job, Show::Lines { to, last: None }, now)
    }

    fn begin(job: Job, show: Show, now: Instant) -> Self {
        let step = job.first_step;
        Self { job, show, started: now, step, readings: VecDeque::from([(now, step)]), loss: Mean::default() }
    }

    /// Reports that `step` steps are done, `first_step` included, and the loss of the last one where there is one.
    pub fn update(&mut self, step: u64, loss: Option<f64>) {
        self.update_at(step, loss, Instant::now());
    }

    /// Moves the end, for a job whose length follows from its speed.
    pub fn set_total_steps(&mut self, total: u64) {
        self.job.total_steps = total;
        if let Show::Bar(bar) = &self.show {
            bar.set_length(total);
        }
    }

    /// Prints a line of its own without disturbing the bar.
    pub fn say(&mut self, line: &str) {
        match &mut self.show {
            Show::Bar(bar) => bar.println(line),
            Show::Lines { to, .. } => put(to, line),
        }
    }

    /// Ends the bar, or prints the last line, and gives the mean speed.
    pub fn finish(mut self) -> Pace {
        self.finish_at(Instant::now())
    }

    fn update_at(&mut self, step: u64, loss: Option<f64>, now: Instant) {
        self.step = step;
        if let Some(loss) = loss {
            self.loss.add(loss);
        }
        self.readings.push_back((now, step));
        let old = |(at, _): &(Instant, u64)| now.duration_since(*at) > WINDOW;
        // One reading older than the window stays, so that slow steps have a speed, too.
        while self.readings.len() > READINGS || self.readings.get(1).is_some_and(old) {
            self.readings.pop_front();
        }
        let due = match &self.show {
            Show::Bar(_) => true,
            Show::Lines { last, .. } => last.is_none_or(|last| now.duration_since(last) >= LINE_EVERY),
        };
        if due {
            self.draw(now);
        }
    }

    fn draw(&mut self, now: Instant) {
        let words = self.words();
        match &mut self.show {
            Show::Bar(bar) => {
                bar.set_position(self.step);
                bar.set_message(words);
            }
            Show::Lines { to, last } => {
                *last = Some(now);
                let Job { name, total_steps, .. } = &self.job;
                put(to, &format!("{name} {}/{total_steps}  {words}", self.step));
            }
        }
    }

    fn finish_at(&mut self, now: Instant) -> Pace {
        if matches!(&self.show, Show::Lines { last, .. } if last != &self.readings.back().map(|r| r.0)) {
            self.draw(now);
        }
        if let Show::Bar(bar) = &self.show {
            bar.abandon(); // stops drawing and leaves the bar as it is, full or not
        }
        let seconds = now.duration_since(self.started).as_secs_f64();
        let steps = self.step.saturating_sub(self.job.first_step);
        let per_s = if seconds > 0.0 { steps as f64 / seconds } else { 0.0 };
        Pace {
            seconds,
            steps,
            images_per_s: per_s * self.job.images_per_step,
            gflops_per_s: per_s * self.job.flops_per_step / 1e9,
        }
    }

    /// Loss, speeds and time left, as far as they are known.
    fn words(&self) -> String {
        let mut parts = Vec::new();
        if let Some(loss) = self.loss.value() {
            parts.push(format!("loss {loss:.4}"));
        }
        if let Some(per_s) = self.steps_per_s() {
            parts.push(match self.job.images_per_step {
                0.0 => format!("{} steps/s", rounded(per_s)),
                images => format!("{} images/s", rounded(per_s * images)),
            });
            if self.job.flops_per_step > 0.0 {
                parts.push(format!("{} GFLOP/s", rounded(per_s * self.job.flops_per_step / 1e9)));
            }
            let left = self.job.total_steps.saturating_sub(self.step);
            parts.push(format!("ETA {}", duration(left as f64 / per_s)));
        }
        parts.join("  ")
    }

    fn steps_per_s(&self) -> Option<f64> {
        let ((from, first), (to, last)) = self.readings.front().zip(self.readings.back())?;
        let seconds = to.duration_since(*from).as_secs_f64();
        (seconds > 0.0 && last > first).then(|| (last - first) as f64 / seconds)
    }
}

/// A line on a stream that may be gone: a job does not end because nobody reads.
fn put(to: &mut impl Write, line: &str) {
    let _ = writeln!(to, "{line}");
    let _ = to.flush();
}

/// Running mean, corrected for its start.
#[derive(Default)]
struct Mean {
    sum: f64,
    weight: f64,
}

impl Mean {
    fn add(&mut self, x: f64) {
        let keep = 0.5f64.powf(1.0 / LOSS_HALF_LIFE);
        self.sum = keep * self.sum + (1.0 - keep) * x;
        self.weight = keep * self.weight + (1.0 - keep);
    }

    fn value(&self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.sum / self.weight)
    }
}

/// Three digits, whole from 100 on.
fn rounded(x: f64) -> String {
    let decimals = match x {
        x if x >= 99.95 => 0,
        x if x >= 9.995 => 1,
        _ => 2,
    };
    format!("{x:.decimals$}")
}

/// `12s`, `3m05s`, `2h07m`, `4d03h`.
pub fn duration(seconds: f64) -> String {
    let s = seconds.max(0.0).round() as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        3600..86_400 => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
        _ => format!("{}d{:02}h", s / 86_400, s % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Page(Arc<Mutex<Vec<u8>>>);

    impl Write for Page {
        fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(buf)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Page {
        fn lines(&self) -> Vec<String> {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap().lines().map(str::to_owned).collect()
        }
    }

    fn job() -> Job {
        Job {
            name: "train".into(),
            first_step: 100,
            total_steps: 1100,
            images_per_step: 128.0,
            flops_per_step: 25e9,
        }
    }

    #[test]
    fn plain_lines_come_every_few_seconds_with_speed_and_time_left() {
        let (page, start) = (Page::default(), Instant::now());
        let mut progress = Progress::lines(job(), Box::new(page.clone()), start);
        // 4 steps a second for 12 s, after 100 steps of an earlier run.
        for k in 1..=48 {
            progress.update_at(100 + k, Some(0.5), start + Duration::from_millis(250 * k));
        }
        let pace = progress.finish_at(start + Duration::from_secs(12));
        let expected = [
            "train 101/1100  loss 0.5000  512 images/s  100 GFLOP/s  ETA 4m10s",
            "train 121/1100  loss 0.5000  512 images/s  100 GFLOP/s  ETA 4m05s",
            "train 141/1100  loss 0.5000  512 images/s  100 GFLOP/s  ETA 4m00s",
            "train 148/1100  loss 0.5000  512 images/s  100 GFLOP/s  ETA 3m58s",
        ];
        assert_eq!(page.lines(), expected);
        assert_eq!(pace, Pace { seconds: 12.0, steps: 48, images_per_s: 512.0, gflops_per_s: 100.0 });
    }

    #[test]
    fn speed_is_that_of_the_last_seconds() {
        let (page, start) = (Page::default(), Instant::now());
        let mut progress = Progress::lines(job(), Box::new(page.clone()), start);
        for k in 1..=100 {
            progress.update_at(100 + k, None, start + Duration::from_secs(k)); // one a second
        }
        for k in 1..=300 {
            progress.update_at(
                200 + k,
                None,
                start + Duration::from_secs(100) + Duration::from_millis(100 * k),
            );
        }
        let per_s = progress.steps_per_s().unwrap();
        assert!((per_s - 10.0).abs() < 0.1, "{per_s}");
        assert!(page.lines().iter().all(|l| !l.contains("loss")), "no loss was given");
    }

    #[test]
    fn the_end_can_move_and_a_finished_job_writes_its_last_line_once() {
        let (page, start) = (Page::default(), Instant::now());
        let mut progress = Progress::lines(job(), Box::new(page.clone()), start);
        progress.set_total_steps(101);
        progress.say("a word");
        progress.update_at(101, Some(f64::NAN), start + Duration::from_secs(1));
        progress.finish_at(start + Duration::from_secs(2));
        assert_eq!(page.lines(), ["a word", "train 101/101  loss NaN  128 images/s  25.0 GFLOP/s  ETA 0s"]);
    }

    #[test]
    fn steps_of_different_sizes_are_counted_as_steps() {
        let (page, start) = (Page::default(), Instant::now());
        let mut progress = Progress::lines(
            Job { images_per_step: 0.0, flops_per_step: 0.0, ..job() },
            Box::new(page.clone()),
            start,
        );
        progress.update_at(103, None, start + Duration::from_secs(1));
        assert_eq!(page.lines(), ["train 103/1100  3.00 steps/s  ETA 5m32s"]);
    }

    #[test]
    fn durations_have_two_units() {
        let table = [
            (0.2, "0s"),
            (59.4, "59s"),
            (59.6, "1m00s"),
            (3599.0, "59m59s"),
            (7620.0, "2h07m"),
            (357_000.0, "4d03h"),
            (-1.0, "0s"),
            (f64::INFINITY, "213503982334601d07h"),
        ];
        for (seconds, expected) in table {
            assert_eq!(duration(seconds), expected);
        }
    }

    #[test]
    fn a_bar_takes_the_same_calls() {
        let bar = ProgressBar::hidden();
        let mut progress = Progress::begin(job(), Show::Bar(bar.clone()), Instant::now());
        progress.set_total_steps(300);
        progress.update(150, Some(1.0));
        progress.update(200, Some(1.0));
        assert_eq!((bar.position(), bar.length()), (200, Some(300)));
        assert!(bar.message().starts_with("loss 1.0000"), "{}", bar.message());
        assert_eq!(progress.finish().steps, 100);
        assert!(bar.is_finished());
    }
}
