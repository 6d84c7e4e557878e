"""Class probabilities of trained methods: accuracy by protocol, temperature."""
