//! The whole program, as its users call it. One test program, so that it is linked once.

mod common;
#[cfg(target_os = "linux")]
mod driver;

mod auto;
mod bad_input;
mod batch;
mod batch_company;
mod batch_forms;
mod before_weights;
#[cfg(target_os = "linux")]
mod chat_templates;
mod compare;
mod config;
#[cfg(unix)]
mod demo;
mod doctor;
mod errors_page;
#[cfg(unix)]
mod faults;
mod fuzz_inputs;
mod golden_quant;
#[cfg(target_os = "linux")]
mod gpu_driver;
#[cfg(target_os = "linux")]
mod gpu_faults;
mod hostile;
#[cfg(unix)]
mod hub;
#[cfg(target_os = "linux")]
mod inputs;
mod kept_texts;
#[cfg(target_os = "linux")]
mod launch;
mod main_job;
mod numa;
mod other_engines;
#[cfg(target_os = "linux")]
mod outputs;
mod parallel;
mod prompts;
#[cfg(unix)]
mod readers;
#[cfg(unix)]
mod resume;
mod selftest;
#[cfg(unix)]
mod serve;
#[cfg(unix)]
mod signals;
mod slot_policies;
mod soak;
mod store;
mod what_if;
mod within_budget;
