package load

import "bytes"

// headBytes is how much of a body is kept to show what came instead of what was expected.
const headBytes = 40

// A search looks for a text in a body that comes in pieces.
type search struct {
	want  []byte
	found bool
	head  []byte // of the body
	tail  []byte // what came last: one byte less than could hold the text
}

func (s *search) reset() {
	s.found = len(s.want) == 0
	s.head = s.head[:0]
	s.tail = s.tail[:0]
}

func (s *search) add(p []byte) {
	if s.found || len(p) == 0 {
		return
	}
	s.head = append(s.head, p[:min(len(p), headBytes-len(s.head))]...)
	keep := len(s.want) - 1
	s.tail = append(s.tail, p[:min(len(p), keep)]...)
	if s.found = bytes.Contains(s.tail, s.want) || bytes.Contains(p, s.want); s.found {
		return
	}
	if len(p) > keep {
		s.tail = append(s.tail[:0], p[len(p)-keep:]...)
	} else if extra := len(s.tail) - keep; extra > 0 {
		s.tail = append(s.tail[:0], s.tail[extra:]...)
	}
}
