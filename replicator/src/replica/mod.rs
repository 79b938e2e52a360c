//! The replica: journal, image, driver.

pub mod image;
pub mod journal;
