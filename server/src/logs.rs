//! Log lines: one JSON object each, with keys that stay.
//!
//! `time`, `level`, `member`, `target` and `message` are in every line; `group`, `term`, `index` and `error` where they
//! apply, always under these names.

use std::fmt;

use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use crate::cli::Failure;
use crate::settings::{LogFormat, LogTo, ServeSettings};

/// Writes events as JSON.
struct JsonLines {
    member: String,
}

/// The fields of an event in order.
#[derive(Default)]
struct Fields {
    message: String,
    rest: Vec<(&'static str, Value)>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        self.rest.push((field.name(), value));
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            self.message = text;
        } else {
            self.put(field, Value::String(text));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message = value.to_owned();
        } else {
            self.put(field, value.into());
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
}

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let metadata = event.metadata();
        let text = |text: &str| Value::String(text.to_owned());
        write!(writer, r#"{{"time":{},"level":{}"#, text(&time), text(metadata.level().as_str()))?;
        write!(writer, r#","member":{},"target":{}"#, text(&self.member), text(metadata.target()))?;
        write!(writer, r#","message":{}"#, text(&fields.message))?;
        for (name, value) in fields.rest.iter().filter(|(name, _)| *name != "member") {
            write!(writer, ",{}:{value}", text(name))?;
        }
        writeln!(writer, "}}")
    }
}

/// Starts logging for the whole process.
pub(crate) fn start(settings: &ServeSettings) -> Result<(), Failure> {
    match settings.log_to {
        LogTo::Stderr => start_on(settings, std::io::stderr),
        LogTo::Stdout => start_on(settings, std::io::stdout),
    }
}

fn start_on<W: for<'a> MakeWriter<'a> + Send + Sync + 'static>(
    settings: &ServeSettings,
    writer: W,
) -> Result<(), Failure> {
    let filter = EnvFilter::try_new(&settings.log_level)
        .map_err(|e| Failure::usage(format!("log-level is no filter: {e} found='{}'", settings.log_level)))?;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_ansi(false);
    let started = match settings.log_format {
        LogFormat::Json => {
            let format = JsonLines { member: settings.name.clone() };
            tracing::subscriber::set_global_default(subscriber.event_format(format).finish())
        }
        LogFormat::Text => tracing::subscriber::set_global_default(subscriber.finish()),
    };
    started.map_err(|e| Failure::other(format!("cannot start logging: {e}")))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("not poisoned").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_is_one_object_with_the_stable_keys() {
        let buffer = Buffer::default();
        let made = buffer.clone();
        let format = JsonLines { member: "a\"b".into() };
        let subscriber = tracing_subscriber::fmt().event_format(format).with_writer(move || made.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(group = 1u64, term = 3u64, index = 17u64, role = "leader", "role changed");
        });
        let text = String::from_utf8(buffer.0.lock().expect("not poisoned").clone()).expect("utf-8");
        assert_eq!(text.lines().count(), 1);
        let line: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(line["member"], "a\"b");
        assert_eq!(line["level"], "INFO");
        assert_eq!(line["message"], "role changed");
        assert_eq!((&line["group"], &line["term"], &line["index"]), (&1.into(), &3.into(), &17.into()));
        assert_eq!(line["role"], "leader");
        assert!(line["time"].is_string() && line["target"].is_string());
    }
}
