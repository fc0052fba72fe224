/** The real server, with the real model, on a port of its own. */

import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { ROOT } from './browser.mjs'

export const PYTHON =
  process.env.PYTHON ?? (existsSync(`${ROOT}.venv/bin/python`) ? `${ROOT}.venv/bin/python` : 'python3')

/** @returns {Promise<{ url: string, stop: () => Promise<void>, kill: () => void }>} */
export async function startServer(...flags) {
  const child = spawn(PYTHON, ['-m', 'tempo_mlx', 'serve', '--port', '0', ...flags], { cwd: ROOT, detached: true })
  const gone = new Promise((resolve) => child.once('exit', resolve))
  let log = ''
  const url = await new Promise((resolve, reject) => {
    const read = (data) => {
      log += data
      const found = log.match(/Serving on (http:\/\/\S+)/)
      if (found) resolve(found[1])
    }
    child.stdout.on('data', read)
    child.stderr.on('data', read)
    child.once('error', reject)
    child.once('exit', (code) => reject(new Error(`The server ended with ${code}:\n${log}`)))
  })
  for (let tries = 0; (await health(url)) !== 'ok'; tries++) {
    if (tries > 600) throw new Error(`The model was not loaded in time:\n${log}`)
    await new Promise((resolve) => setTimeout(resolve, 500))
  }
  return {
    url,
    stop: async () => {
      child.kill('SIGTERM')
      await gone
    },
    /** the server and its worker, at once */
    kill: () => process.kill(-child.pid, 'SIGKILL'),
  }
}

async function health(url) {
  const response = await fetch(`${url}/health`).catch(() => null)
  return response && (await response.json()).status
}
