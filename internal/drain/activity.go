package drain

import "time"

// An Activity is what an Order knows of one connection. Times are of CLOCK_MONOTONIC; 0 is never.
type Activity struct {
	LastIn  time.Duration // when the last payload came in
	LastOut time.Duration // when the last payload went out

	// Gap is the longest time between two payloads of one response, lately; TCP's own pauses don't count.
	Gap time.Duration
	// Responses is the number of responses begun.
	Responses uint32
	// Open says that the last payload ended like a part of an HTTP message that goes on, and that responses on this
	// connection weren't seen to end that way.
	Open bool
	// Complete says that the last payload ended a chunked HTTP body: the response is over.
	Complete bool
}

// fadeShift: each new request takes 1/8 off the longest gap, so that one hiccup of the server's doesn't last.
const fadeShift = 3
