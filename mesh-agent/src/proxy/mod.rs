//! placeholder

pub mod balance;
