//! `cargo demo`: three replicas, a killed leader, and a proof that no acknowledged write was lost.

fn main() -> std::process::ExitCode {
    mainstay_server::demo::main()
}
