//go:build linux

package keeper

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/berth-net/berth/internal/sys"
)

// maxMessage bounds a packet; a Unix socket's default buffer is a little more (net.core.wmem_default).
const maxMessage = 192 << 10

// Client is the supervisor's end of the protocol. It is safe for concurrent use.
type Client struct {
	sock   *os.File
	events chan Event

	mu      sync.Mutex // guards next, waiting and err, not the socket
	next    uint64
	waiting map[uint64]chan reply
	err     error
}

type reply struct {
	message
	files []*os.File
}

// NewClient speaks to the keeper on a socket and owns it.
func NewClient(sock *os.File) *Client {
	c := &Client{sock: sock, events: make(chan Event), waiting: map[uint64]chan reply{}}
	arrived := make(chan Event)
	go c.receive(arrived)
	go c.queue(arrived)
	return c
}

// Events come in the order in which they happened; the channel is closed when the keeper is gone.
func (c *Client) Events() <-chan Event { return c.events }

// queue keeps events until somebody takes them: who waits for a reply may be the one who takes events.
func (c *Client) queue(arrived <-chan Event) {
	defer close(c.events)
	var waiting []Event
	for arrived != nil || len(waiting) > 0 {
		var out chan<- Event
		var first Event
		if len(waiting) > 0 {
			out, first = c.events, waiting[0]
		}
		select {
		case ev, ok := <-arrived:
			if !ok {
				return
			}
			waiting = append(waiting, ev)
		case out <- first:
			waiting = waiting[1:]
		}
	}
}

func (c *Client) receive(arrived chan<- Event) {
	defer close(arrived)
	buf := make([]byte, maxMessage)
	for {
		n, files, err := sys.ReceiveMessage(c.sock, buf)
		var m message
		if err == nil {
			err = json.Unmarshal(buf[:n], &m)
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = errors.New("the keeper has ended")
			}
			c.mu.Lock()
			c.err = err
			for id, ch := range c.waiting {
				delete(c.waiting, id)
				close(ch)
			}
			c.mu.Unlock()
			return
		}
		if m.ID == 0 {
			var ev Event
			if json.Unmarshal(m.Body, &ev) == nil {
				arrived <- ev
			}
			continue
		}
		c.mu.Lock()
		ch := c.waiting[m.ID]
		delete(c.waiting, m.ID)
		c.mu.Unlock()
		if ch == nil {
			closeAll(files)
			continue
		}
		ch <- reply{m, files}
	}
}

func (c *Client) call(op string, args, result any) ([]*os.File, error) {
	body, err := json.Marshal(args)
	if err != nil {
		return nil, err
	}
	ch := make(chan reply, 1)
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return nil, c.err
	}
	c.next++
	id := c.next
	c.waiting[id] = ch
	c.mu.Unlock()

	data, err := json.Marshal(message{ID: id, Op: op, Body: body})
	if err == nil && len(data) > maxMessage {
		err = fmt.Errorf("a request of %d bytes is larger than the %d that the keeper takes", len(data), maxMessage)
	}
	if err == nil {
		err = sys.SendMessage(c.sock, data)
	}
	if err != nil {
		c.mu.Lock()
		delete(c.waiting, id)
		c.mu.Unlock()
		return nil, fmt.Errorf("keeper: %s: %w", op, err)
	}
	r, ok := <-ch
	if !ok {
		c.mu.Lock()
		defer c.mu.Unlock()
		return nil, c.err
	}
	if r.Error != nil {
		closeAll(r.files)
		return nil, r.Error
	}
	if result != nil {
		if err := json.Unmarshal(r.Body, result); err != nil {
			closeAll(r.files)
			return nil, fmt.Errorf("keeper: %s: %w", op, err)
		}
	}
	return r.files, nil
}

// Hello begins: the inventory, the control socket, then the output descriptors of each worker in turn.
func (c *Client) Hello() (Inventory, []*os.File, error) {
	var inv Inventory
	files, err := c.call(opHello, map[string]int{"version": Version}, &inv)
	return inv, files, err
}

// Hold opens a waiting room.
func (c *Client) Hold(h Hold) (Listener, error) {
	var l Listener
	_, err := c.call(opHold, h, &l)
	return l, err
}

// Start begins a generation and returns when its command has been executed; the files are the reading ends of its output.
func (c *Client) Start(s Start) (Begun, []*os.File, error) {
	var b Begun
	files, err := c.call(opStart, s, &b)
	return b, files, err
}

// Steer sends all new connections of every form that the generation listens on to it.
func (c *Client) Steer(generation int) error {
	_, err := c.call(opSteer, generation, nil)
	return err
}

// Probe lets one source address reach one listener.
func (c *Client) Probe(p Probe) error {
	_, err := c.call(opProbe, p, nil)
	return err
}

// Queues reads all accept queues.
func (c *Client) Queues() ([]Queue, error) {
	var q []Queue
	_, err := c.call(opQueues, nil, &q)
	return q, err
}

// Listeners lists all that the keeper holds.
func (c *Client) Listeners() ([]Listener, error) {
	var l []Listener
	_, err := c.call(opListeners, nil, &l)
	return l, err
}

// Close closes one listener, which its program has closed.
func (c *Client) Close(listener int) error {
	_, err := c.call(opClose, listener, nil)
	return err
}

// Release closes the listeners of a generation (0: the waiting rooms) to which no connection is steered any more; what waited
// on them migrates. It returns how many connections waited on each.
func (c *Client) Release(generation int) ([]Queue, error) {
	var q []Queue
	_, err := c.call(opRelease, generation, &q)
	return q, err
}

// Relay hands a listener to a process that forwards what waits on it.
func (c *Client) Relay(r Relay) error {
	_, err := c.call(opRelay, r, nil)
	return err
}

// Refuse lets the generation's listeners take no new connection; what waits on them is kept.
func (c *Client) Refuse(generation int) error {
	_, err := c.call(opRefuse, generation, nil)
	return err
}

// Duplicate duplicates another process' descriptor.
func (c *Client) Duplicate(pid, fd int) (*os.File, error) {
	files, err := c.call(opDuplicate, [2]int{pid, fd}, nil)
	if err != nil {
		return nil, err
	}
	if len(files) != 1 {
		closeAll(files)
		return nil, errors.New("keeper: duplicate: no descriptor came")
	}
	return files[0], nil
}

// State stores the supervisor's state.
func (c *Client) State(blob json.RawMessage) error {
	_, err := c.call(opState, blob, nil)
	return err
}

// Exit ends the keeper with a status. The keeper closes all it holds.
func (c *Client) Exit(status int) error {
	_, err := c.call(opExit, status, nil)
	return err
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
