//! Counters as Prometheus reads them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::batching::stats::{BOUNDS, Histogram};
use super::batching::{Batcher, Phase};

/// What HTTP counts; the batcher counts for itself.
#[derive(Debug)]
pub struct Metrics {
    started: Instant,
    requests: Mutex<BTreeMap<(String, u16), Histogram>>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self { started: Instant::now(), requests: Mutex::default() }
    }
}

impl Metrics {
    /// Notes an answered request.
    pub fn request(&self, route: &str, status: u16, took: Duration) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.entry((route.to_owned(), status)).or_default().note(took);
    }

    /// Time since the start.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// The text exposition; `models` are their names, `ready` whether the server takes requests.
    pub fn text(&self, batcher: &Batcher, models: &[String], ready: bool) -> String {
        let (stats, load) = (batcher.stats(), batcher.load());
        let mut page = Page::default();
        page.family("build_info", "gauge", "what runs");
        page.value("build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1.0);
        page.one("ready", "gauge", "1 while requests are taken", f64::from(u8::from(ready)));
        let draining = matches!(batcher.phase(), Phase::Draining | Phase::Stopped);
        page.one("draining", "gauge", "1 while the server ends", f64::from(u8::from(draining)));
        page.one("uptime_seconds", "gauge", "time since the start", self.uptime().as_secs_f64());
        if let Some(bytes) = resident_bytes() {
            page.one("resident_memory_bytes", "gauge", "memory of the process", bytes);
        }

        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone();
        page.family("requests_total", "counter", "answered requests by route and status");
        for ((route, code), times) in &requests {
            let labels = [("route", route.as_str()), ("code", &code.to_string())];
            page.value("requests_total", &labels, times.count() as f64);
        }
        page.family("request_seconds", "histogram", "time until the answer's head by route and status");
        for ((route, code), times) in &requests {
            page.histogram(
                "request_seconds",
                &[("route", route.as_str()), ("code", &code.to_string())],
                times,
            );
        }

        page.family("order_seconds", "histogram", "time from acceptance to the last image");
        page.histogram("order_seconds", &[], &stats.total);
        page.family("queue_seconds", "histogram", "time from acceptance to the first step");
        page.histogram("queue_seconds", &[], &stats.queued);
        page.one("orders", "gauge", "requests that are accepted and not ended", batcher.orders() as f64);
        page.one("orders_finished_total", "counter", "requests that got all images", stats.finished as f64);
        page.one("images_total", "counter", "finished images", stats.images as f64);
        page.family("orders_failed_total", "counter", "accepted requests that failed, by reason");
        for reason in ["cancelled", "deadline", "engine", "not_finite", "stopped"] {
            let count = stats.failed.get(reason).copied().unwrap_or_default();
            page.value("orders_failed_total", &[("reason", reason)], count as f64);
        }
        page.family("orders_refused_total", "counter", "requests that were not accepted, by reason");
        for reason in ["full", "loading", "draining"] {
            let count = stats.refused.get(reason).copied().unwrap_or_default();
            page.value("orders_refused_total", &[("reason", reason)], count as f64);
        }

        page.family("steps_total", "counter", "steps by model and rows of the batch");
        page.family("step_seconds_total", "counter", "their time");
        for ((model, rows), steps) in &stats.steps {
            let name = models.get(*model).map_or("", String::as_str);
            let labels = [("model", name), ("rows", &rows.to_string())];
            page.value("steps_total", &labels, steps.count as f64);
            page.value("step_seconds_total", &labels, steps.seconds);
        }
        page.one(
            "rows_used_total",
            "counter",
            "rows of batches that belonged to an image",
            stats.rows_used as f64,
        );
        page.one("rows_run_total", "counter", "rows of all batches", stats.rows_run as f64);
        for (name, help, value) in [
            ("queue_image_steps", "image-steps that are accepted and not done", 0),
            ("queue_limit_image_steps", "most image-steps that are accepted beyond a full batch", 1),
            ("image_steps_per_second", "measured rate with full batches", 2),
            ("queue_fill", "how near the next refusal is, from 1 on orders are refused; what to scale by", 3),
        ] {
            page.family(name, "gauge", help);
            for (model, l) in models.iter().zip(&load) {
                let values = [l.waiting as f64, l.limit as f64, l.rate, l.fill];
                page.value(name, &[("model", model)], values[value]);
            }
        }
        page.one("engine_faults_total", "counter", "steps that failed", stats.faults as f64);
        page.one("engine_restarts_total", "counter", "starts after a fault", stats.restarts as f64);
        page.text()
    }
}

/// An exposition that is being written: families in order, each with all of its values.
#[derive(Default)]
struct Page {
    families: Vec<(&'static str, String)>,
}

impl Page {
    fn family(&mut self, name: &'static str, kind: &str, help: &str) {
        let head = format!("# HELP mudit_{name} {help}\n# TYPE mudit_{name} {kind}\n");
        self.families.push((name, head));
    }

    fn one(&mut self, name: &'static str, kind: &str, help: &str, value: f64) {
        self.family(name, kind, help);
        self.value(name, &[], value);
    }

    fn value(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let line = format!("mudit_{name}{} {value}\n", braces(labels));
        if let Some((_, text)) = self.families.iter_mut().rfind(|(family, _)| name.starts_with(family)) {
            text.push_str(&line);
        }
    }

    fn histogram(&mut self, name: &str, labels: &[(&str, &str)], times: &Histogram) {
        let mut below = 0;
        for (i, count) in times.counts.iter().enumerate() {
            below += count;
            let bound = BOUNDS.get(i).map_or("+Inf".to_owned(), f64::to_string);
            let labels: Vec<_> = labels.iter().copied().chain([("le", bound.as_str())]).collect();
            self.value(&format!("{name}_bucket"), &labels, below as f64);
        }
        self.value(&format!("{name}_sum"), labels, times.sum);
        self.value(&format!("{name}_count"), labels, below as f64);
    }

    fn text(self) -> String {
        self.families.into_iter().map(|(_, text)| text).collect()
    }
}

fn braces(labels: &[(&str, &str)]) -> String {
    if labels.is_empty() {
        return String::new();
    }
    let mut text = String::from("{");
    for (i, (name, value)) in labels.iter().enumerate() {
        let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let _ = write!(text, "{}{name}=\"{value}\"", if i == 0 { "" } else { "," });
    }
    text + "}"
}

/// Memory of this process, where the system tells.
fn resident_bytes() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches(" kB").parse::<f64>().ok().map(|kb| kb * 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_belongs_to_the_family_above_it() {
        let metrics = Metrics::default();
        metrics.request("/v1/images/generations", 200, Duration::from_millis(30));
        metrics.request("/a\"b\\c", 404, Duration::from_mins(15));
        let text = metrics.text(&Batcher::new(), &["m".to_owned()], true);
        let mut family = "";
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                family = rest.split(' ').next().unwrap();
            } else if !line.starts_with('#') {
                assert!(line.starts_with(family), "{line} under {family}");
                assert!(line.rsplit(' ').next().unwrap().parse::<f64>().is_ok(), "{line}");
            }
        }
        assert!(text.contains(r#"mudit_requests_total{route="/a\"b\\c",code="404"} 1"#), "{text}");
        let bucket = r#"mudit_request_seconds_bucket{route="/v1/images/generations",code="200",le="#;
        assert!(
            text.contains(&format!("{bucket}\"0.02\"}} 0"))
                && text.contains(&format!("{bucket}\"0.05\"}} 1"))
        );
        assert!(text.contains(r#"code="404",le="300"} 0"#) && text.contains(r#"code="404",le="+Inf"} 1"#));
    }
}
