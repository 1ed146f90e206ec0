"""What graders share: answers, arithmetic, equality."""
