//! placeholder
pub mod records;
pub type LogFilter =
    tracing_subscriber::reload::Handle<tracing_subscriber::EnvFilter, tracing_subscriber::Registry>;
pub fn run(_: crate::config::AgentConfig, _: LogFilter) -> anyhow::Result<()> {
    Ok(())
}
pub fn uninstall(_: &crate::config::AgentConfig) -> anyhow::Result<()> {
    Ok(())
}
