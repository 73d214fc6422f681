"""What each rank will take, before it starts; a report, which no stage of training imports."""
