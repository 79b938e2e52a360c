//! Naive oracle of the tests.
