//! Version 1 of the record set format.
