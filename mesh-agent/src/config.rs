//! The agent's configuration: parsed once, validated before anything starts, in sections.
//! placeholder
