//! Telling people what was made.

mod report;

register_stages!(report::Report);
