"""What workers do with objects of multiprocessing. Workers import it: it imports nothing heavy."""

from __future__ import annotations

import os
import signal

_held = None


def put(queue, value):
    queue.put(value)


def serve(queue):
    """Answer one item of a joinable queue."""
    item = queue.get()
    queue.task_done()
    return item


def use(lock):
    """Whether a lock, semaphore or condition can be had."""
    with lock:
        return True


def is_taken(lock):
    return not lock.acquire(block=False)


def release(semaphore):
    semaphore.release()


def notify(condition):
    with condition:
        condition.notify_all()


def set_event(event):
    event.set()


def wait_at(barrier, timeout):
    return barrier.wait(timeout)


def add_one(value):
    with value.get_lock():
        value.value += 1


def set_raw(value, number):
    value.value = number


def set_first(array, number):
    array[0] = number


def say(connection, text):
    """Say something and who says it; and close."""
    connection.send((text, os.getpid()))
    connection.close()


def say_deep(where):
    """`say` on a connection in a list in a dict."""
    where["there"][0].send("deep")


def shout(sock, data):
    sock.sendall(data)


def same(first, second):
    return first is second


def fds():
    """This process's open descriptors."""
    return len(os.listdir("/proc/self/fd"))


def new_pipe(text):
    """The reading end of a new pipe in which something lies."""
    import multiprocessing

    here, there = multiprocessing.Pipe(duplex=False)
    there.send(text)
    return {"ends": [here]}


def new_socket(data):
    import socket

    here, there = socket.socketpair()
    there.sendall(data)
    return here


def new_lock():
    import multiprocessing

    return multiprocessing.get_context("fork").Lock()


def new_value():
    import multiprocessing

    return multiprocessing.get_context("fork").Value("i", 3)


def fail_with(connection):
    raise ValueError(connection)


def say_and_die(connection):
    connection.send("begun")
    os.kill(os.getpid(), signal.SIGKILL)


def write_shared(memory, data):
    memory.buf[: len(data)] = data
    memory.close()


def write_list(items, value):
    items[0] = value
    items.shm.close()


def hold(value):
    """An initializer."""
    global _held
    _held = value


def held():
    return _held


def put_held(value):
    _held.put(value)


class Box:
    """A resource whose methods take and give what is not easy to pickle."""

    def __init__(self, queue=None):
        self.queue = queue

    def say(self, connection, text):
        connection.send(text)

    def pipe(self, text):
        return new_pipe(text)["ends"][0]

    def lock(self):
        return new_lock()


class Marked:
    """Something for which a reducer is registered in the process that calls."""

    def __init__(self, text, reduced=False):
        self.text = text
        self.reduced = reduced


def unmark(text):
    return Marked(text, True)


def was_reduced(marked):
    return marked.text, marked.reduced
